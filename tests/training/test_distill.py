"""The objective of distillation against formulas of its own, and by tokens against all at once."""

import math

import pytest
import torch
from encoders import swapped as swapped_encoder
from encoders import tiny_model as tiny_encoder
from families import CONVERTED, swap, swapped, tiny_model
from torch.nn.functional import log_softmax

from linearize_cli.methods.recipe import Distill, Lora
from linearize_cli.models.batch import IGNORED, Batch
from linearize_cli.runtime.dispatch import attention_implementation, converted
from linearize_cli.training.chunked_logits import decode
from linearize_cli.training.distillation import Distillation
from linearize_cli.training.loop import trainable
from linearize_cli.training.student import (
    add_lora,
    checkpointable,
    checkpointed,
    lora_targets,
    merge,
    unfreeze,
)

# What a family does to its logits behind the output embedding, in values that show.
SCALED = {
    "gemma2": dict(final_logit_softcapping=0.4),
    "cohere": dict(logit_scale=0.3),
    "granite": dict(logits_scaling=7.0),
    "llama": {},
}


def batch_of(length=11, vocabulary=99, rows=3, ignored=(), counted=None):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    labels = torch.cat([ids[:, 1:], torch.full((rows, 1), IGNORED)], 1)
    labels[:, list(ignored)] = IGNORED
    return Batch({"input_ids": ids, "use_cache": False}, labels, counted)


def with_lora(model, **options):
    """LoRA whose updates are not zero."""
    student = add_lora(model, Lora(rank=2, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return student


@pytest.mark.parametrize("family", sorted(CONVERTED))
def test_logits_by_tokens_are_the_model_s(family):
    model, inputs = tiny_model(family, **SCALED.get(family, {})), batch_of().inputs
    with torch.no_grad():
        expected, decoded = model(**inputs).logits, decode(model, inputs)
        pieces = [decoded.logits(rows) for rows in decoded.rows().split(7)]
    torch.testing.assert_close(torch.cat(pieces).view_as(expected), expected, rtol=1e-5, atol=1e-5)
    assert bool(decoded.parts) == (family != "opt"), "its logits are whole, or no longer"
    assert decoded.output.logits.shape[1] == (1 if decoded.parts else expected.shape[1])


@pytest.mark.parametrize("family", ["bart", "bert", "modernbert", "t5"])
def test_logits_by_tokens_of_models_with_an_encoder(family):
    model = tiny_encoder(family)
    ids = torch.randint(3, 80, (2, 9))
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids[:, :6], "use_cache": False}
    with torch.no_grad():
        expected, decoded = model(**inputs).logits, decode(model, inputs)
        assert decoded.parts
        pieces = [decoded.logits(rows) for rows in decoded.rows().split(5)]
    torch.testing.assert_close(torch.cat(pieces).view_as(expected), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", SCALED)
def test_the_loss_is_the_formula_s_and_by_tokens_the_same(family):
    """In fp64, with everything that a loss can be made of; the limit of 300 logits is 3 tokens at a time."""
    model = swapped(family, **SCALED[family]).double()
    student = with_lora(model)
    counted = torch.rand(3, 11, generator=torch.Generator().manual_seed(2)) < 0.6
    batch = batch_of(counted=counted)
    batch.labels[~counted] = IGNORED
    batch.labels[0, 2] = IGNORED
    weights = Distill(kl=0.7, ce=0.4, hidden=0.3)

    native = tiny_model(family).config._attn_implementation
    with torch.no_grad(), attention_implementation(student, native), student.disable_adapter():
        taught = student(**batch.inputs, output_hidden_states=True)
    said = student(**batch.inputs, output_hidden_states=True)
    p, log_p, log_q = taught.logits.softmax(-1), log_softmax(taught.logits, -1), log_softmax(said.logits, -1)
    kl = (p * (log_p - log_q)).sum(-1)[counted].mean()
    right = batch.labels != IGNORED
    ce = -log_q[right].gather(-1, batch.labels[right][:, None]).mean()
    rows = zip(said.hidden_states[-1], taught.hidden_states[-1], counted, strict=True)
    errors = [((a[own] - b[own]) ** 2).sum() / (b[own] ** 2).sum() for a, b, own in rows]
    expected = 0.7 * kl + 0.4 * ce + 0.3 * sum(errors) / 3

    gradients = []
    for limit in (10**9, 300):
        loss, records = Distillation(student, native, weights, limit=limit)(batch)
        assert records == {}
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-11, atol=1e-12)
        loss.backward()
        gradients.append({name: p.grad for name, p in trainable(student).items() if p.grad is not None})
        student.zero_grad()
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-13)


def bytes_kept(objective, batch):
    """The most bytes of saved tensors that live at once, parameters not counted, and the loss."""
    known = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    live, most = {}, 0

    class Kept:
        def __init__(self, tensor):
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            if self.key not in known:
                count, size = live.get(self.key, (0, tensor.untyped_storage().nbytes()))
                live[self.key] = (count + 1, size)

        def __del__(self):
            if self.key in live:
                count, size = live.pop(self.key)
                if count > 1:
                    live[self.key] = (count - 1, size)

    def pack(tensor):
        nonlocal most
        kept = Kept(tensor)
        most = max(most, sum(size for _, size in live.values()))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = objective(batch)[0]
    loss.backward()
    return most, loss.item()


def test_a_large_vocabulary_does_not_need_its_logits_at_once():
    """Check the peak: the logits of 2 x 40 tokens and 5000 words take 1.6 MB, those of 8 tokens a tenth."""
    student = with_lora(swapped("llama", vocab_size=5000))
    batch = batch_of(40, 5000, rows=2)
    whole, loss = bytes_kept(Distillation(student, "sdpa", Distill()), batch)
    parts, same = bytes_kept(Distillation(student, "sdpa", Distill(), limit=8 * 5000), batch)
    logits = 2 * 40 * 5000 * 4
    assert same == pytest.approx(loss, rel=1e-6)
    assert whole - parts > 0.9 * 2 * logits  # the log-probabilities of both


def test_lora_reaches_what_it_is_to():
    """All Linear layers of a converted layer, whatever they are called; nothing of the layer that stays softmax."""
    model = tiny_model("gpt2")
    linear, _ = swap(model, keep=1)
    assert lora_targets(model) == [
        f"transformer.h.{i}.attn.{part}" for i in range(3) for part in ("c_attn", "c_proj")
    ]
    assert set(lora_targets(model, "all")) == {
        f"transformer.h.{i}.{part}"
        for i in range(3)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    model = swapped_encoder("t5")
    wi = [name for name in lora_targets(model, "all") if name.endswith(".wi")]
    assert wi and not any(name.endswith(".wi") for name in lora_targets(model))


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_lora_is_merged_exactly(targets):
    model = swapped("llama").double()
    student = with_lora(model, targets=targets)
    batch = batch_of()
    with torch.no_grad():
        expected = student(**batch.inputs).logits
        merged = merge(student)(**batch.inputs).logits
    torch.testing.assert_close(merged, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_lora_every_weight_but_the_embeddings_is_trained(dtype, tied):
    model = swapped("llama", tie_word_embeddings=tied).to(dtype)
    for module in converted(model).values():
        module.linear_attention.float()
    names = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in names.items()}
    batch, storage = batch_of(), {p.data_ptr() for p in model.parameters()}
    with torch.no_grad(), attention_implementation(model, "sdpa"):
        expected = model(**batch.inputs).logits
    teacher = unfreeze(model)
    trained = trainable(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert len(trained) == len(names) - len(frozen)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    copied = [p for p in teacher.parameters() if p.data_ptr() not in storage]
    total = sum(
        p.numel() for name, p in names.items() if "linear_attention" not in name and name not in frozen
    )
    assert sum(p.numel() for p in copied) == total and not any(p.requires_grad for p in teacher.parameters())

    objective = Distillation(model, "sdpa", Distill(lora=None), teacher)
    optimizer = torch.optim.AdamW(trainable(objective).values(), lr=1e-5)
    for _ in range(3):
        loss = objective(batch)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(), objective.as_teacher() as softmax:
        torch.testing.assert_close(softmax(**batch.inputs).logits, expected, rtol=0, atol=0)
        said = model(**batch.inputs).logits
    merged = merge(model)
    assert merged.state_dict().keys() >= before.keys()
    after = dict(merged.named_parameters())
    assert after.keys() == before.keys()
    for name in before:
        assert after[name].dtype == before[name].dtype, name
        if dtype == torch.float32:
            assert torch.equal(after[name], before[name]) == (name in frozen), name
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch.inputs).logits, said, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_checkpointing_changes_memory_and_no_gradient(family):
    """OPT's layers would drop out in the training mode in which transformers checkpoints."""
    student, batch = with_lora(swapped(family)), batch_of(64)
    objective = Distillation(student, "sdpa", Distill(hidden=0.5))
    found = []
    for context in (lambda model: checkpointed(model), None):
        with context(student) if context else pytest.MonkeyPatch.context():
            most, loss = bytes_kept(objective, batch)
        found.append((most, loss, {n: p.grad for n, p in trainable(student).items() if p.grad is not None}))
        student.zero_grad()
    (less, loss, gradients), (more, same, expected) = found
    assert loss == same and less < 0.5 * more
    assert gradients.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=0, atol=0)
    assert not any("forward" in vars(layer) for layer in checkpointable(student))


def test_bfloat16_learns_in_fp32():
    """Weights in bf16; all that is trained, and the state, in fp32: losses are finite and fall."""
    model = swapped("llama").to(torch.bfloat16)
    for module in converted(model).values():
        module.linear_attention.float()
    student = add_lora(model, Lora())
    objective, batch = Distillation(student, "sdpa", Distill(), limit=500), batch_of()
    assert {p.dtype for p in trainable(objective).values()} == {torch.float32}
    optimizer = torch.optim.AdamW(trainable(objective).values(), lr=5e-3)
    losses = []
    for _ in range(25):
        loss = objective(batch)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.5 * losses[0]
    state = model.model.layers[0].self_attn.linear_attention.empty_state(1, "cpu", torch.bfloat16)
    assert state.S.dtype == state.z.dtype == torch.float32
