"""The families of transforms and flows, each with the cases that the laws try out."""
