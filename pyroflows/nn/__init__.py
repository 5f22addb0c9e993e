"""Networks: plain torch modules that know nothing of flows."""

from .convnet import ConvNet
from .embedding import DeepSet, Entries, SeriesNet
from .encoder import RowEncoder, RowSource, RowTable
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
    "Entries",
    "Network",
    "ResNet",
    "RowEncoder",
    "RowSource",
    "RowTable",
    "SeriesNet",
    "Startable",
    "convnet",
    "mlp",
    "resnet",
]
