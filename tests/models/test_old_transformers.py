"""Models that an old transformers computes wrongly are refused, not converted with wrong numbers."""

import pytest
from tiny_checkpoint import save_tokenizer, tiny_model

from linearize_cli.errors import UserError
from linearize_cli.models.load import load_shape, load_teacher
from linearize_cli.runtime import compatibility


@pytest.mark.parametrize("load", [load_teacher, load_shape])
def test_a_model_that_is_computed_wrongly_is_refused(load, tmp_path, monkeypatch):
    tiny_model("gemma2", head_dim=8).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    monkeypatch.setattr(compatibility, "VERSION", (5, 17))
    with pytest.raises(UserError, match="computes `gemma2` wrongly: it leaves out the soft cap") as refused:
        load(str(tmp_path))
    assert "transformers>=5.23" in refused.value.hint
    monkeypatch.setattr(compatibility, "VERSION", (5, 23))
    load(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "causal", "wrong"), [("rembert", True, True), ("rembert", False, False), ("llama", True, False)]
)
def test_a_decoder_alone_is_refused(kind, causal, wrong, monkeypatch):
    monkeypatch.setattr(compatibility, "VERSION", (5, 17))
    assert bool(compatibility.fault(kind, causal)) is wrong
