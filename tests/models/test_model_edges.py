"""Edge cases in ordinary use: ignored labels, pad = eos, mixed folders, refusals before any work."""

from __future__ import annotations

import pytest
import torch

from mpoe import MPOEConfig, convert_to_mpoe, load_mpoe, save_mpoe_only

from .small_models import FAMILIES


def pair(family: str, **options):
    torch.manual_seed(0)
    dense = FAMILIES[family]().eval()
    return dense, convert_to_mpoe(dense, MPOEConfig(**{"num_experts": 3, "shape": "separable", **options}))


def test_ignored_labels_inside_a_target_are_not_padding() -> None:
    dense, model = pair("t5")
    ids, labels = torch.randint(2, 60, (2, 7)), torch.randint(2, 60, (2, 6))
    labels[:, 2] = -100
    labels[1, 4:] = -100  # this is padding
    with torch.no_grad():
        expected, got = dense(input_ids=ids, labels=labels), model(input_ids=ids, labels=labels)
    kept = labels.ne(-100)
    assert torch.allclose(got.logits[kept], expected.logits[kept], atol=1e-5)
    assert int(got.expert_load[-1].sum()) == 6 + 4


def test_generate_when_padding_is_the_end_token() -> None:
    dense, model = pair("t5")
    ids = torch.randint(2, 60, (1, 7))
    ids[0, 3] = 1
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "eos_token_id": 1}
    for m in (dense, model):
        m.generation_config.pad_token_id = m.generation_config.eos_token_id = 1
    assert torch.equal(model.generate(ids, **options), dense.generate(ids, **options))


def test_one_kind_of_save_replaces_or_refuses_the_other(tmp_path) -> None:
    dense, model = pair("gpt2")
    save_mpoe_only(model, tmp_path, dense)
    assert load_mpoe(tmp_path, dense, dtype=torch.bfloat16).dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    ids = torch.randint(2, 60, (1, 5))
    assert torch.equal(load_mpoe(tmp_path)(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"must not hold a whole model; .* has model\.safetensors"):
        save_mpoe_only(model, tmp_path, dense)
    assert not list(tmp_path.glob(".incomplete-*"))


def test_mpoe_only_save_without_its_identity_is_refused(tmp_path) -> None:
    dense, model = pair("gpt2")
    save_mpoe_only(model, tmp_path, dense)
    (tmp_path / "mpoe_base.json").unlink()
    with pytest.raises(ValueError, match=r"must hold mpoe_base\.json"):
        load_mpoe(tmp_path, dense)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "egaer"}, r"backend must be one of \['auto', 'eager'.*got 'egaer'"),
        ({"layers_to_transform": []}, "nothing is left to convert"),
    ],
)
def test_refused_before_any_work(options: dict, message: str) -> None:
    dense = FAMILIES["t5"]()
    with pytest.raises(ValueError, match=message):
        convert_to_mpoe(dense, MPOEConfig(num_experts=2, **options))


def test_float16_t5_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="Prefer bfloat16"):
        convert_to_mpoe(FAMILIES["t5"]().half(), MPOEConfig(num_experts=2, shape="separable"))


def test_a_model_without_weights_and_a_path_that_is_none_are_refused(tmp_path):
    with torch.device("meta"):
        model = FAMILIES["gpt2"]()
    with pytest.raises(ValueError, match=r"model must hold weights; .* is on the device meta"):
        convert_to_mpoe(model)
    for path in (None, 3):
        with pytest.raises(TypeError, match="path must be the folder of a saved model; got"):
            load_mpoe(path)


def test_saves_of_parameters_alone_refuse_what_is_no_folder(tmp_path):
    dense = FAMILIES["gpt2"]()
    model = convert_to_mpoe(dense, MPOEConfig(num_experts=2, shape="separable"))
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(NotADirectoryError, match=r"path must be a folder; .* is none"):
            save_mpoe_only(model, tmp_path / name, dense)
    with pytest.raises(ValueError, match=r"path must be a folder's path; got"):
        save_mpoe_only(model, tmp_path / "no\0path", dense)
    with pytest.raises(ValueError, match="base must be a dense model or its folder; '' is not a folder"):
        save_mpoe_only(model, tmp_path / "out", "")
    with pytest.raises(ValueError, match="base must be a GPT2LMHeadModel or its folder; "):
        save_mpoe_only(model, tmp_path / "out", tmp_path)
