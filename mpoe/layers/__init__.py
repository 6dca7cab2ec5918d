"""Layers: routers, experts and drop-in modules in MPO form. They need torch and mpoe_kernels, but
not transformers."""

from mpoe.layers.context import (
    RouterRecord,
    RoutingContext,
    checkpoint_contexts,
    current_routing,
    global_batch,
    routing_context,
)
from mpoe.layers.cores import ExpertWeights, MPOCores, grouped_dense_linear
from mpoe.layers.drop_in import MPOEmbedding, MPOLinear, SharedEmbedding, TiedHead
from mpoe.layers.experts import ACTIVATIONS, DenseExperts, MPOExperts
from mpoe.layers.feed_forward import KeptFeedForward, MPOEFeedForward, RoutedFeedForward
from mpoe.layers.hidden import HiddenExperts, HiddenFeedForward
from mpoe.layers.losses import load_balancing_loss, router_z_loss
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
