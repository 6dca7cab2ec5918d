"""Layers: routers, experts and drop-in modules in MPO form. They need torch and mpoe_kernels, but
not transformers."""

from types import ModuleType as _Module

from mpoe.layers.context import RouterRecord as RouterRecord
from mpoe.layers.context import RoutingContext as RoutingContext
from mpoe.layers.context import checkpoint_contexts as checkpoint_contexts
from mpoe.layers.context import current_routing as current_routing
from mpoe.layers.context import global_batch as global_batch
from mpoe.layers.context import routing_context as routing_context
from mpoe.layers.cores import ExpertWeights as ExpertWeights
from mpoe.layers.cores import MPOCores as MPOCores
from mpoe.layers.cores import grouped_dense_linear as grouped_dense_linear
from mpoe.layers.drop_in import MPOEmbedding as MPOEmbedding
from mpoe.layers.drop_in import MPOLinear as MPOLinear
from mpoe.layers.drop_in import SharedEmbedding as SharedEmbedding
from mpoe.layers.drop_in import TiedHead as TiedHead
from mpoe.layers.experts import ACTIVATIONS as ACTIVATIONS
from mpoe.layers.experts import DenseExperts as DenseExperts
from mpoe.layers.experts import MPOExperts as MPOExperts
from mpoe.layers.feed_forward import KeptFeedForward as KeptFeedForward
from mpoe.layers.feed_forward import MPOEFeedForward as MPOEFeedForward
from mpoe.layers.feed_forward import RoutedFeedForward as RoutedFeedForward
from mpoe.layers.hidden import HiddenExperts as HiddenExperts
from mpoe.layers.hidden import HiddenFeedForward as HiddenFeedForward
from mpoe.layers.losses import load_balancing_loss as load_balancing_loss
from mpoe.layers.losses import router_z_loss as router_z_loss
from mpoe.layers.neurons import NeuronExperts as NeuronExperts
from mpoe.layers.neurons import NeuronFeedForward as NeuronFeedForward
from mpoe.layers.router import RouterOutput as RouterOutput
from mpoe.layers.router import TopKRouter as TopKRouter

__all__ = [
    name for name, value in globals().items() if name[0] != "_" and not isinstance(value, _Module)
]
