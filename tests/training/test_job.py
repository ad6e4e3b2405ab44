"""One job on a tiny model and real rows: it learns, repeats itself, leaves the model alone, folds exactly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from promptd_store import decode
from transformers import AutoModelForCausalLM

from promptd.errors import InvalidRequestError, NumericalError
from promptd.llm import LLM
from promptd.modeling import FrozenModel
from promptd.training import (
    METHODS,
    Example,
    MethodConfig,
    PrefixTuningConfig,
    Progress,
    PromptTuningConfig,
    PTuningV2Config,
    ResidualConfig,
    TaskFormat,
    TrainingConfig,
    TrainingJob,
    TrainingResult,
    Watcher,
    encode_examples,
    evaluate,
    forward_texts,
    make_artifact,
    method_from_sidecar,
    objective_for,
    parse_examples,
    provenance,
    train,
)

METHOD = ResidualConfig(num_virtual_tokens=4, bottleneck_size=8)
CONFIG = TrainingConfig(METHOD, num_steps=4, batch_size=3, num_evaluations=2, seed=1)
SNIPS = [  # rows of Snips (Coucke et al. 2018, CC0 1.0)
    ("Will it be chilly at noon in Idaho", "GetWeather"),
    ("what is the weather forecast for my current place", "GetWeather"),
    ("Is it going to be stormy in Cuba", "GetWeather"),
    ("what will the weather be in north carolina", "GetWeather"),
    ("Will it get warmer in Nevada", "GetWeather"),
    ("Play some music by Nicole", "PlayMusic"),
    ("play a song by the band Nightwish", "PlayMusic"),
    ("Use Netflix to play the album of 1999", "PlayMusic"),
    ("I want to hear music from the nineties", "PlayMusic"),
    ("play the top 20 tunes by Kool Moe Dee", "PlayMusic"),
]
INTENTS = TaskFormat("{text}\nIntent:", {"GetWeather": " weather", "PlayMusic": " music"})


@pytest.fixture(scope="module")
def snips() -> list[Example]:
    """Ten real voice commands of two intents."""
    return parse_examples(json.dumps({"text": text, "label": label}) for text, label in SNIPS)


def train_on(
    model: FrozenModel,
    rows: list[Example],
    task: TaskFormat,
    config: TrainingConfig,
    watcher: Watcher | None = None,
    **kwargs: bytes,
) -> TrainingResult:
    """Train on rows and validate on the same ones: what is tested is the loop, not generalization."""
    job = TrainingJob(model, config, task, rows, rows, **kwargs)  # type: ignore[arg-type]
    return train(model, {"job": job}, {"job": watcher or Watcher()})["job"]


@pytest.mark.parametrize(
    "method",
    [
        ResidualConfig(8, init="class_labels", learning_rate=0.3),
        PromptTuningConfig(8),
        PTuningV2Config(8),
        PrefixTuningConfig(8, learning_rate=0.01),
    ],
    ids=lambda config: config.name,
)
def test_every_kind_learns_real_rows(llama: FrozenModel, snips: list[Example], method: MethodConfig) -> None:
    """On real commands every kind gets far below the bare model's loss and above the majority class."""
    config = TrainingConfig(method, num_steps=40, batch_size=10, num_evaluations=4)
    history: list[Progress] = []
    result = train_on(llama, snips, INTENTS, config, Watcher(history.append))
    assert result.selection.accuracy is not None and result.report.accuracy is not None
    assert (result.selection.accuracy + result.report.accuracy) / 2 >= 0.8
    assert result.majority is not None and result.majority[1] <= 0.8
    losses = [progress.loss for progress in history]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_model_is_untouched(llama: FrozenModel, snips: list[Example]) -> None:
    """The digest of the weights in memory is the same before and after training, and it would notice a change."""
    before = llama.digest()
    train_on(llama, snips, INTENTS, CONFIG)
    assert llama.digest() == before
    weight = next(llama.hf.parameters())
    kept = weight.flatten()[0].item()
    with torch.no_grad():
        weight.flatten()[0] = kept + 1
        assert llama.digest() != before
        weight.flatten()[0] = kept
    assert llama.digest() == before


def test_same_seed_same_bytes(llama: FrozenModel, text_rows: list[Example]) -> None:
    """Training depends on nothing but model, data and settings; torch's global generator is neither read nor moved."""
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = train_on(llama, text_rows, TaskFormat(), CONFIG)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    second = train_on(llama, text_rows, TaskFormat(), CONFIG)
    other = train_on(llama, text_rows, TaskFormat(), dataclasses.replace(CONFIG, seed=2))
    assert torch.equal(first.prompt, second.prompt) and first.sidecar == second.sidecar
    assert not torch.equal(first.prompt, other.prompt)


@pytest.mark.parametrize("name", ["residual", "p_tuning_v2"])
def test_fold_is_exact_and_served_exactly(
    llama: FrozenModel, tiny_models: dict[str, Path], text_rows: list[Example], name: str
) -> None:
    """Logits of the artifact, through transformers as a plain prompt, are those of the live parameters."""
    result = train_on(llama, text_rows, TaskFormat(), dataclasses.replace(CONFIG, method=METHODS[name].config_class(4)))
    live = method_from_sidecar(result.sidecar, result.config.method, llama)
    text = tuple(llama.encode("book a table"))
    index = torch.arange(len(text))
    expected = forward_texts(llama, live.materialize(), [text], index)
    artifact = decode(make_artifact(llama, TaskFormat(), result).content, llama.spec)
    prompt = next(iter(artifact.tensors.values()))
    torch.testing.assert_close(forward_texts(llama, prompt, [text], index), expected, rtol=0, atol=1e-5)
    if name == "residual":
        hf = AutoModelForCausalLM.from_pretrained(tiny_models["llama"]).eval()
        embeds = torch.cat([prompt, hf.get_input_embeddings()(torch.tensor(text))])
        plain = hf(inputs_embeds=embeds.unsqueeze(0)).logits[0, 4:]
        torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["residual", "p_tuning_v2"])
def test_the_engine_scores_as_the_trainer_does(llama: FrozenModel, snips: list[Example], name: str) -> None:
    """Accuracy in the record is what the serving engine answers for the stored artifact, label words and template."""
    config = dataclasses.replace(CONFIG, method=METHODS[name].config_class(6), num_steps=20, batch_size=10)
    result = train_on(llama, snips, INTENTS, config)
    artifact = decode(make_artifact(llama, INTENTS, result).content, llama.spec)
    words = artifact.manifest.label_words
    assert words == INTENTS.label_words and artifact.manifest.template == INTENTS.template
    scores = LLM(llama).score([row.fields["text"] for row in snips], list(words.values()), [artifact] * len(snips))
    labels = [list(words)[row.index(max(row))] for row in scores]
    served = sum(label == row.label for label, row in zip(labels, snips, strict=True)) / len(snips)
    rows = encode_examples(llama, INTENTS, snips, 6)
    assert evaluate(llama, result.prompt, rows, objective_for(llama, INTENTS)).accuracy == pytest.approx(served)


def test_the_best_step_is_kept(llama: FrozenModel, text_rows: list[Example]) -> None:
    """The folded prompt is the one that was best on the selection half, not the last; the other half only reports."""
    fast = dataclasses.replace(METHOD, learning_rate=3.0)
    config = dataclasses.replace(CONFIG, method=fast, num_steps=12, num_evaluations=12)
    history: list[Progress] = []
    job = TrainingJob(llama, config, TaskFormat(), text_rows, text_rows)
    result = train(llama, {"job": job}, {"job": Watcher(history.append)})["job"]
    losses = {progress.step: progress.scores.loss for progress in history if progress.scores}
    assert len(losses) == 12 and result.best_step == min(losses, key=lambda step: losses[step])
    again = evaluate(llama, result.prompt, job.selection_rows, job.objective)
    assert again.loss == pytest.approx(min(losses.values()))
    assert not {row.example.line for row in job.selection_rows} & {row.example.line for row in job.report_rows}


def test_patience_ends_training_early(llama: FrozenModel, text_rows: list[Example]) -> None:
    """So many evaluations without a new best one end the job; without patience it goes on."""
    still = PromptTuningConfig(4, learning_rate=1e-30)
    config = dataclasses.replace(CONFIG, method=still, num_steps=12, num_evaluations=12)
    patient = dataclasses.replace(config, patience=3)
    ended = train_on(llama, text_rows, TaskFormat(), patient)
    assert (ended.best_step, ended.num_steps) == (1, 4)
    assert train_on(llama, text_rows, TaskFormat(), config).num_steps == 12


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_a_checkpoint_goes_on_bit_for_bit(
    llama: FrozenModel, text_rows: list[Example], optimizer: str, stop_at: int
) -> None:
    """A job that is written down after any step and read into a new one ends with the bytes of an unbroken run."""
    method = dataclasses.replace(METHOD, dropout=0.2)
    config = dataclasses.replace(CONFIG, method=method, num_steps=8, num_evaluations=4, optimizer=optimizer)
    unbroken = train_on(llama, text_rows, TaskFormat(), config)
    saved: list[bytes] = []
    train_on(llama, text_rows, TaskFormat(), config, Watcher(on_checkpoint=saved.append, checkpoint_seconds=-1))
    assert len(saved) == 8
    job = TrainingJob(llama, config, TaskFormat(), text_rows, text_rows)
    job.restore(saved[stop_at - 1])
    resumed = train(llama, {"job": job})["job"]
    assert torch.equal(resumed.prompt, unbroken.prompt) and resumed.sidecar == unbroken.sidecar
    assert (resumed.report, resumed.best_step) == (unbroken.report, unbroken.best_step)
    without = TrainingJob(llama, config, TaskFormat(), text_rows, text_rows)
    without.restore(saved[stop_at - 1])
    without.method.generator.manual_seed(99)  # the control: random draws are part of the state
    assert train(llama, {"job": without})["job"].sidecar != resumed.sidecar or resumed.best_step <= stop_at


def test_a_checkpoint_of_other_rows_is_refused(llama: FrozenModel, text_rows: list[Example]) -> None:
    """Going on with other data, or from other bytes, is a typed error."""
    saved: list[bytes] = []
    train_on(llama, text_rows, TaskFormat(), CONFIG, Watcher(on_checkpoint=saved.append, checkpoint_seconds=-1))
    other = TrainingJob(llama, CONFIG, TaskFormat(), text_rows[1:], text_rows[1:])
    with pytest.raises(InvalidRequestError, match="other rows"):
        other.restore(saved[0])
    with pytest.raises(InvalidRequestError, match="not a checkpoint"):
        other.restore(b"\x00" * 20)


def test_training_resumes_from_the_sidecar(llama: FrozenModel, text_rows: list[Example]) -> None:
    """The parameters before folding come back as they were, and training goes on from them."""
    result = train_on(llama, text_rows, TaskFormat(), CONFIG)
    live = method_from_sidecar(result.sidecar, METHOD, llama)
    assert torch.equal(live.fold(), result.prompt)
    slow = dataclasses.replace(METHOD, learning_rate=0.1)
    longer = dataclasses.replace(CONFIG, method=slow, num_steps=30)
    resumed = train_on(llama, text_rows, TaskFormat(), longer, resume_from=result.sidecar)
    assert resumed.selection.loss < result.selection.loss


def test_a_callback_that_raises_ends_training(llama: FrozenModel, text_rows: list[Example]) -> None:
    """Cancellation is an exception out of the progress callback, between two steps."""

    class CancelledByTestError(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.step == 2:
            raise CancelledByTestError

    with pytest.raises(CancelledByTestError):
        train_on(llama, text_rows, TaskFormat(), CONFIG, Watcher(stop))


def test_a_time_limit_ends_training_early(llama: FrozenModel, text_rows: list[Example]) -> None:
    """With a limit on seconds the rate still falls to its end and a prompt comes out."""
    config = dataclasses.replace(CONFIG, num_steps=100_000, max_seconds=0.2)
    history: list[Progress] = []
    train_on(llama, text_rows, TaskFormat(), config, Watcher(history.append))
    assert 1 <= len(history) < 1000 and history[-1].scores is not None
    assert config.share_done(5, 0.1) == 0.5 and config.share_done(5, 9.0) == 1.0


def test_the_rate_rises_and_falls() -> None:
    """Linear: up during warm-up, down to the end, never zero; constant stays up."""
    config = TrainingConfig(num_steps=100, warmup_ratio=0.1)
    scales = [config.rate_scale(step / 100) for step in range(100)]
    assert scales[10] == 1.0 and scales[:11] == sorted(scales[:11]) and scales[10:] == sorted(scales[10:], reverse=True)
    assert min(scales) > 0 and scales[55] == pytest.approx(0.5)
    assert dataclasses.replace(config, schedule="constant").rate_scale(0.99) == 1.0


def test_divergence_is_a_typed_error(llama: FrozenModel, text_rows: list[Example]) -> None:
    """A rate that blows up the prompt ends in an error that names the step."""
    with pytest.raises(NumericalError, match=r"not finite"):
        too_fast = dataclasses.replace(METHOD, learning_rate=1e38)
        train_on(llama, text_rows, TaskFormat(), dataclasses.replace(CONFIG, method=too_fast, num_steps=20))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_steps", 0),
        ("weight_decay", -1.0),
        ("schedule", "step"),
        ("optimizer", "sgd"),
        ("warmup_ratio", 1.0),
        ("max_seconds", 0.0),
        ("max_grad_norm", float("nan")),
        ("method", "residual"),
    ],
)
def test_settings_name_field_and_value(field: str, value: object) -> None:
    """A wrong setting is refused on creation."""
    with pytest.raises(InvalidRequestError) as caught:
        TrainingConfig(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field and str(value) in caught.value.message


def test_provenance_is_plain_json(llama: FrozenModel, snips: list[Example]) -> None:
    """Method, settings, seed, data digest, scores before and after and the majority class are recorded."""
    recorded = json.loads(json.dumps(provenance(train_on(llama, snips, INTENTS, CONFIG))))
    assert recorded["method"] == "residual" and recorded["seed"] == 1
    assert recorded["hyperparameters"]["bottleneck_size"] == 8
    assert recorded["hyperparameters"]["learning_rate"] == METHOD.learning_rate
    assert recorded["data_digest"].startswith("sha256:")
    assert set(recorded["scores"]) == {"before", "after", "selection"}
    assert 0.5 <= recorded["majority"]["share"] <= 1
