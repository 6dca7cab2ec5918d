"""Layers: routers, experts and drop-in modules in MPO form. They need torch and mpoe_kernels, but not transformers."""

from mpoe.layers.activations import ACTIVATIONS
from mpoe.layers.context import (
    RouterRecord,
    RoutingContext,
    checkpoint_contexts,
    current_routing,
    routing_context,
)
from mpoe.layers.cores import MPOCores
from mpoe.layers.dense import ExpertWeights, grouped_dense_linear
from mpoe.layers.experts import DenseExperts, MixtureExperts, MPOExperts
from mpoe.layers.feed_forward import MPOEFeedForward, RoutedFeedForward
from mpoe.layers.hidden import HiddenExperts, HiddenFeedForward
from mpoe.layers.kept import KeptFeedForward
from mpoe.layers.losses import global_batch, load_balancing_loss, router_z_loss
from mpoe.layers.mpo_embedding import MPOEmbedding, SharedEmbedding, TiedHead
from mpoe.layers.mpo_linear import MPOLinear
from mpoe.layers.neurons import NeuronExperts, NeuronFeedForward
from mpoe.layers.router import RouterOutput, TopKRouter

__all__ = [
    "ACTIVATIONS",
    "DenseExperts",
    "ExpertWeights",
    "HiddenExperts",
    "HiddenFeedForward",
    "KeptFeedForward",
    "MPOCores",
    "MPOEFeedForward",
    "MPOEmbedding",
    "MPOExperts",
    "MPOLinear",
    "MixtureExperts",
    "NeuronExperts",
    "NeuronFeedForward",
    "RoutedFeedForward",
    "RouterOutput",
    "RouterRecord",
    "RoutingContext",
    "SharedEmbedding",
    "TiedHead",
    "TopKRouter",
    "checkpoint_contexts",
    "current_routing",
    "global_batch",
    "grouped_dense_linear",
    "load_balancing_loss",
    "router_z_loss",
    "routing_context",
]
