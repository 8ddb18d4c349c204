"""`--dry-run`: its counts against real models and hand arithmetic, its memory against measured peaks."""

import gc
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from click.testing import CliRunner
from families import CONVERTED, SMALL, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from linearize_cli import convert
from linearize_cli.cli import cli
from linearize_cli.conversion.costs import costs
from linearize_cli.conversion.estimate import Estimate
from linearize_cli.conversion.layer_selection import choose_layers, plan_layers
from linearize_cli.conversion.phantom import Phantom
from linearize_cli.errors import UserError
from linearize_cli.methods.registry import load_recipe
from linearize_cli.metrics.timing import peak_bytes
from linearize_cli.models.batch import causal_batch
from linearize_cli.runtime import linearize
from linearize_cli.runtime.model import linear_parameters
from linearize_cli.training.attention_transfer import Transfer
from linearize_cli.training.distillation import Distillation
from linearize_cli.training.job import Job
from linearize_cli.training.student import lora_targets, student_and_teacher

LENGTH, ROWS = 256, 4
FACTOR = 1.5  # between the estimate of memory and the measured peak
RECIPE = load_recipe("augmented", ("attention.local.size=8", "attention.conv.width=4"))
RANK = RECIPE.recover.distill.lora.rank


def without_weights(family):
    model_type, own = CONVERTED[family]
    config = CONFIG_MAPPING[model_type](**{**SMALL, **own})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()


def counted(family, keep=None, recipe=RECIPE):
    model = without_weights(family)
    with Phantom():
        linear, softmax = choose_layers(plan_layers(model), keep)
    return costs(model, linear, softmax, recipe, LENGTH)


def student_of(family, keep=None, recipe=RECIPE):
    """The real model, converted, and with LoRA, as recovery has it."""
    model = tiny_model(family)
    linear, softmax = choose_layers(plan_layers(model), keep)
    native = model.config._attn_implementation
    record = {
        "base_class": type(model).__name__,
        "base_model_type": model.config.model_type,
        "method": "test",
    }
    record |= {"attention": recipe.to_dict()["attention"], "softmax": [layer.name for layer in softmax]}
    linearize(model, {**record, "layers": {layer.name: layer.geometry for layer in linear}})
    model.requires_grad_(False)
    for parameter in linear_parameters(model):
        parameter.requires_grad_(True)
    return model, native


def with_lora(model):
    student = get_peft_model(model, LoraConfig(r=RANK, target_modules=lora_targets(model, "all")))
    for parameter in linear_parameters(model):
        parameter.requires_grad_(True)
    return student


def random_batch():
    return causal_batch(torch.randint(3, 90, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)))


def peak_of_a_step(objective, parameters):
    """The bytes of the models and the most bytes that tensors take while a step of AdamW is done."""

    def step(optimizer):
        objective(random_batch())[0].backward()
        optimizer.step()

    models = {id(p): p.nbytes for p in (*objective.parameters(), *objective.buffers())}
    gc.collect()  # memory that is freed during the step would count against its peak
    # A new thread has no buffers of earlier steps to use again.
    with ThreadPoolExecutor(max_workers=1) as thread:
        measured = thread.submit(peak_bytes, lambda: torch.optim.AdamW(parameters), step, "cpu")
        return sum(models.values()) + measured.result()[1]


@pytest.mark.parametrize("family", sorted(CONVERTED))
def test_a_plan_needs_no_weights(family):
    model = without_weights(family)
    with Phantom():
        found = plan_layers(model)
    expected = plan_layers(tiny_model(family))
    assert [(x.name, x.geometry, x.refusal) for x in found] == [
        (x.name, x.geometry, x.refusal) for x in expected
    ]


@pytest.mark.parametrize(
    "family, keep",
    [("llama", None), ("gpt2", "1"), ("mixtral", None), ("gemma2", "at:0"), ("gpt-neox", None)],
)
def test_counts_are_those_of_the_real_model(family, keep):
    found, base = counted(family, keep), tiny_model(family)
    model, _ = student_of(family, keep)
    assert found.parameters == sum(p.numel() for p in base.parameters())
    assert found.bytes == sum(x.nbytes for x in (*base.parameters(), *base.buffers()))
    linear = sum(p.numel() for p in linear_parameters(model))
    assert found.linear == linear
    trained = [p for p in with_lora(model).parameters() if p.requires_grad]
    assert found.others + linear == sum(p.numel() for p in trained)


@pytest.mark.parametrize(
    "family, method, override",
    [
        ("llama", "augmented", "recover.distill.kl=1"),
        ("llama", "augmented", "recover.distill.lora=null"),
        ("llama", "augmented", "recover.distill.lora.targets=attention"),
        ("llama", "hedgehog", "recover.distill.kl=1"),
        ("llama", "lolcats", "recover.distill.kl=1"),
        ("llama", "mamba2", "recover.distill.kl=1"),
        ("llama", "gla", "recover.distill.kl=1"),
        ("llama", "kda", "recover.distill.kl=1"),
        ("gpt2", "augmented", "recover.distill.kl=1"),
        ("mixtral", "augmented", "recover.distill.kl=1"),
    ],
)
def test_memory_is_within_a_factor_of_the_measured_peak(family, method, override):
    recipe = load_recipe(method, [override])
    found = counted(family, recipe=recipe)
    job = Job("model", recipe, (), None, None, LENGTH, ROWS, True, False, None, 0)
    # Tensors are measured. A CPU's estimate would also count blocks that its allocator keeps.
    report = {"estimate": Estimate(found, job, LENGTH, 4, 1, ROWS, "cuda").all()}
    model, native = student_of(family, recipe=recipe)
    transfer = peak_of_a_step(Transfer(model, native), linear_parameters(model))
    student, teacher = student_and_teacher(model, recipe.recover.distill.lora)
    objective = Distillation(student, native, recipe.recover.distill, teacher)
    distill = peak_of_a_step(objective, [p for p in student.parameters() if p.requires_grad])
    estimated = lines(report)
    for section, measured in (("transfer of all layers at once", transfer), ("distillation", distill)):
        ratio = estimated[f"on the device, {section}", "in all"] / measured
        assert 1 / FACTOR < ratio < FACTOR, f"{section}: {ratio:.2f} of the measured {measured:,} bytes"


def test_what_learns_takes_sixteen_bytes():
    model, native = student_of("llama")
    parameters = linear_parameters(model)
    optimizer = torch.optim.AdamW(parameters)
    Transfer(model, native)(random_batch())[0].backward()
    optimizer.step()
    state = [x for values in optimizer.state.values() for x in values.values() if x.dim()]
    nbytes = sum(x.nbytes for x in (*parameters, *(p.grad for p in parameters), *state))
    assert nbytes == 16 * sum(p.numel() for p in parameters)


def test_products_by_hand():
    hidden, inner, kv, vocabulary, layers = 32, 48, 16, 99, 4
    attention = 2 * hidden * hidden + 2 * hidden * kv
    assert counted("llama").products == layers * (attention + 3 * hidden * inner) + hidden * vocabulary
    # Of 4 experts a token passes through 2; the router has 4 outputs.
    expert = layers * (attention + 2 * 3 * hidden * inner + hidden * 4) + hidden * vocabulary
    assert counted("mixtral").products == expert
    assert counted("llama").softmax == layers * 2 * 4 * (8 + 8) * (LENGTH + 1) / 2
    assert counted("llama", "1").stays == 2 * 4 * (8 + 8) * (LENGTH + 1) / 2


def test_layers_of_another_kind_are_counted_apart():
    """Check models whose layers differ: DeepSeek's first layer is dense, and kept layers save nothing in transfer."""
    found = counted("deepseek-v3")
    assert found.layers[0] != found.layers[1] == found.layers[3]
    hybrid = counted("llama", "at:2")
    assert [x.transfer(LENGTH) > 0 for x in hybrid.kept] == [True, True, False, True]


@pytest.fixture(scope="module")
def config_only(tmp_path_factory):
    """A folder with a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("shape") / "llama"
    folder.mkdir()
    config = CONFIG_MAPPING["llama"](**SMALL).to_dict()
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def lines(report):
    return {(line["section"].partition(" (")[0], line["what"]): line["value"] for line in report["estimate"]}


def test_a_dry_run_needs_a_config_alone(config_only):
    common = dict(dry_run=True, device="cuda", tokens=80_000, seq_len=100, batch_size=8, flops=1e12)
    overrides = ("recover.transfer.block_layers=2", "recover.transfer.share=0.4")
    report = convert(str(config_only), overrides=overrides, **common)
    found, (parameters, layer) = lines(report), (47_488 // 2, 0)
    parameters = report["parameters"]
    layer = (parameters - 2 * 99 * 32 - 32) // 4
    at_once, blocks = "on the device, transfer of all layers at once", "on the device, transfer by blocks"
    distill = "on the device, distillation"
    assert found["the model", "parameters"] == parameters
    # Tables of rotary frequencies, fp32, are no parameters.
    assert found[at_once, "weights"] == pytest.approx(2 * parameters, abs=64)
    assert found[blocks, "weights of a block"] == 2 * 2 * layer
    assert found[blocks, "weights outside the layers"] == pytest.approx(2 * (2 * 99 * 32 + 32), abs=64)
    linear = found["the model", "linear parameters"]
    assert found[at_once, "linear parameters"] == 16 * linear == 2 * found[blocks, "its linear parameters"]
    assert found[at_once, "kept for backward"] == 2 * found[blocks, "kept for backward"]
    assert found["on disk", "hidden states between blocks"] == 1 * 32_000 * 32 * 2
    assert found[distill, "in all, gradient checkpointing"] < found[distill, "in all"]
    per_token = 2 * (layer - 2 * 32) * 4 + 2 * 99 * 32 + found["time", "softmax attention"]
    assert found["time", "transfer"] == per_token + 3 * found["time", "linear attention"]
    seconds = [found["time", f"{stage} time"] for stage in ("transfer", "distill")]
    assert seconds == [32_000 * found["time", "transfer"] / 1e12, 48_000 * found["time", "distill"] / 1e12]
    assert list(config_only.parent.iterdir()) == [config_only]

    shards = lines(convert(str(config_only), overrides=overrides, processes=4, **common))
    each = "on the device, distillation, each process"
    assert shards[each, "weights"] == found[distill, "weights"] / 4
    assert shards[each, "kept for backward"] == found[distill, "kept for backward"] / 4
    assert shards["time", "distill time"] == pytest.approx(found["time", "distill time"] / 4)


def test_a_dry_run_prints_its_arithmetic(config_only):
    arguments = ["-q", "convert", str(config_only), "--dry-run", "--seq-len", "100", "--tokens", "80k"]
    several = ["--flops", "2T", "--processes", "2", "--batch-size", "4"]
    result = CliRunner().invoke(cli, [*arguments[1:], *several])
    assert result.exit_code == 0, result.output
    for part in (
        "2 TFLOP/s",
        "gradient checkpointing",
        "multiply-adds a token",
        "/ 2 processes",
        "80,000 tokens",
    ):
        assert part in result.output, result.output
    for wrong in ("0", "fast", "1X", "-2T"):
        assert "not a number of FLOP/s" in CliRunner().invoke(cli, [*arguments[1:], "--flops", wrong]).output


def test_the_speed_is_measured_where_none_is_given(config_only):
    report = convert(str(config_only), dry_run=True, tokens=80_000, seq_len=100)
    line = next(line for line in report["estimate"] if line["what"] == "FLOP/s of a process")
    assert "measured on cpu" in line["arithmetic"] and 1e8 < line["value"] < 1e14


def test_a_dry_run_refuses_what_a_run_would(config_only):
    with pytest.raises(UserError, match="cannot be divided among 3 processes"):
        convert(str(config_only), dry_run=True, tokens=80_000, seq_len=100, processes=3)
    with pytest.raises(UserError, match="no such data"):
        convert(str(config_only), dry_run=True, data=("missing.jsonl",))
