"""Networks: plain torch modules that know nothing of flows."""

from .convnet import ConvNet
from .embedding import DeepSet, Flat, SeriesNet
from .made import MADE
from .mlp import MLP
from .network import Network, convnet, mlp, resnet
from .resnet import ResNet
from .startable import Startable

__all__ = [
    "MADE",
    "MLP",
    "ConvNet",
    "DeepSet",
    "Flat",
    "Network",
    "ResNet",
    "SeriesNet",
    "Startable",
    "convnet",
    "mlp",
    "resnet",
]
