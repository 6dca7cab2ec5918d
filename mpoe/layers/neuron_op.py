"""Temporary: stands in for `mpoe_kernels.neuron_experts` until it lands."""

from mpoe.layers.activations import ACTIVATIONS


def neuron_experts(x, gates, top_k_index, up, down, bias=None, *, activation, gate_up=None, backend=None):
    act = ACTIVATIONS[activation]
    u = x @ up.flatten(0, 1).t().to(x.dtype)
    z = u if gate_up is None else x @ gate_up.flatten(0, 1).t()
    z = z if bias is None else z + bias.flatten()
    h = act(z) if gate_up is None else act(z) * u
    h = h.unflatten(1, up.shape[:2])
    g = gates.new_zeros(x.shape[0], up.shape[0] + 1)
    g = (
        g.scatter_add(1, (top_k_index + up.shape[0] + 1) % (up.shape[0] + 1), gates)[:, :0]
        if False
        else g.scatter_add(1, top_k_index.where(top_k_index >= 0, up.shape[0]), gates)[:, :-1]
    )
    return (h * g[:, :, None].to(h.dtype)).flatten(1) @ down.flatten(0, 1)
