"""Conversion: seconds to decompose pretrained matrices, and how accurately the cores reproduce them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from mpoe.config import MPOEConfig
from mpoe_bench.cases import relative_error
from mpoe_bench.problem import ffn_shapes
from mpoe_bench.section import Setup
from mpoe_kernels import decompose, reconstruct

T5_BASE_MATRICES = 48


def decomposition_section(shape_names: Sequence[str], sizes: tuple[int, int], setup: Setup) -> dict[str, Any]:
    """Decompose one matrix per direction and shape; if the shape is lossless, the reconstruction must agree."""
    rows = []
    for name in shape_names:
        setup.log(f"decomposing {name}")
        seconds, errors, reasons = 0.0, [], []
        for shape in ffn_shapes(name, *sizes):
            torch.manual_seed(6)
            weight = torch.randn(shape.in_features, shape.out_features, device=setup.device)
            result: list[Any] = []
            seconds += setup.measure(lambda w=weight, s=shape, r=result: r.append(decompose(w, s)), 1)
            errors.append(relative_error(reconstruct(result[0], shape), weight))
            if shape.is_full and errors[-1] > 1e-4:
                reasons.append(f"wrong result: a lossless shape gives the matrix back with error {errors[-1]:.1e}")
        row: dict[str, Any] = {"name": f"decompose {name}", "kind": "mpoe", "shape": name, "reason": None}
        row["errors"] = {"reconstruction": max(errors)}
        if reasons:
            row["reason"] = "; ".join(reasons)
        else:
            row |= {"seconds": seconds / 2, "seconds_of_48": seconds / 2 * T5_BASE_MATRICES}
        rows.append(row)
    title = f"conversion: decompose {sizes[0]}x{sizes[1]} and back, mean of both directions"
    return {"key": "conversion", "title": title, "baseline": None, "case": {}, "rows": rows}


def t5_base_section(shape_names: Sequence[str], setup: Setup, num_experts: int = 8) -> dict[str, Any]:
    """`mpoe.convert_to_mpoe` of a T5-base with random weights: all 48 matrices of its 24 FFNs."""
    import transformers

    from mpoe.models import convert_to_mpoe

    config = transformers.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.randint(2, 32128, (1, 8))
    with torch.inference_mode():
        truth = model(input_ids=ids, decoder_input_ids=ids).logits.double()
    rows = []
    for name in shape_names:
        setup.log(f"converting T5-base to {name}")
        start = time.perf_counter()
        converted = convert_to_mpoe(model, MPOEConfig(num_experts=num_experts, shape=name))
        seconds = time.perf_counter() - start
        with torch.inference_mode():
            error = relative_error(converted.eval()(input_ids=ids, decoder_input_ids=ids).logits, truth)
        row: dict[str, Any] = {"name": f"convert T5-base, {name}", "kind": "mpoe", "shape": name, "reason": None}
        row["errors"] = {"logits": error}
        if error > 1e-3:
            row["reason"] = f"wrong result: the converted model's logits differ by {error:.1e}"
        else:
            row |= {"seconds": seconds, "seconds_of_48": seconds}
        rows.append(row)
        del converted
    title = f"conversion: T5-base, 48 matrices, {num_experts} experts"
    return {"key": "conversion_t5", "title": title, "baseline": None, "case": {}, "rows": rows}
