"""The typed run configuration: YAML preset, then ``key=value`` overrides, checked by OmegaConf.

Configuration objects stop at the set-up functions; what they call takes plain values.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from inversion_dpo.run.config_build import BuildConfig
from inversion_dpo.run.config_build import ConfigError as ConfigError

PACKAGE = Path(__file__).parents[1]
PRESETS = PACKAGE / "presets"


@dataclass
class ModelConfig:
    """Which pipeline, and how it samples."""

    path: str = "asset:pipeline"  # diffusers folder or hub id; "asset:" is inside this package
    revision: str | None = None
    variant: str | None = None  # e.g. fp16
    dtype: str = "float32"  # of the frozen weights: float32, bfloat16, float16
    resolution: int = 64  # pixels, square
    vae: str | None = None  # folder or hub id of another autoencoder, e.g. SDXL's fp16 fix
    lora: str | None = None  # an existing LoRA to start from: it becomes part of the reference
    t5: bool = True  # false: Stable Diffusion 3 without its third text encoder
    guidance_embed: float = 1.0  # the guidance that FLUX.1-dev's network is told
    scene_graph: str | None = None  # folder of an encoder: prompts and scene graphs condition
    prompt_chunks: int = 1  # SD1, SD2, SDXL: chunks of 75 tokens that are read of every prompt


@dataclass
class DataConfig:
    """Which preference pairs, and how they are read (docs/reference/formats.md)."""

    pairs: str = "asset:taste.parquet"  # file, folder, or hf:OWNER/NAME, which is streamed
    format: str = "auto"  # auto, parquet, table (csv, json, jsonl), webdataset, dataset, annotated
    split: str = "train"  # of a Hugging Face dataset
    revision: str | None = None  # of a dataset on the hub
    columns: dict[str, str] = field(default_factory=dict)  # ours: theirs, e.g. caption: text
    ranking: str = "best_worst"  # pairs of a ranking: best_worst, adjacent, all
    on_bad_row: str = "error"  # error, skip (counted and named)
    limit: int | None = None  # use only the first pairs
    fit: str = "pad"  # to the square: pad, or crop, which cuts
    flip: bool = False  # mirror half of the pairs, both images; never if left or right is said
    holdout: float = 0.1  # share of pairs never trained on, for held-out implicit accuracy
    prompt_dropout: float = 0.0  # share of pairs shown without their prompt in an epoch
    graph_dropout: float = 0.0  # share of pairs shown without their scene graph in an epoch
    caption_dropout: float = 0.0  # share of pairs shown with their scene graph alone
    label_noise: float = 0.0  # share of training pairs whose labels are swapped, for controls


@dataclass
class InversionConfig:
    """How trajectories are recovered, once, under the frozen reference."""

    steps: int = 20  # N
    spacing: str = "sampler"  # sampler: its own timesteps, read backwards; even: over all T
    guidance_scale: float = 1.0
    fixed_point_iterations: int = 0  # 0: naive DDIM inversion
    t_start: float = 0.0  # below this part of the schedule add noise, above it invert
    keep: int | None = None  # states kept per pair, drawn in t_min..t_max; null: all N
    reconstruct: bool = False  # also sample back, to see what the reference cannot reproduce
    max_error: float | None = None  # leave out pairs whose relative error is above; reconstruct
    batch_size: int = 64  # images

    @property
    def start(self) -> int:
        """Index on the grid of the highest state that is x_0 with noise added; 0: none is."""
        return round(self.t_start * self.steps)


@dataclass
class ObjectiveConfig:
    """The loss."""

    name: str = "inversion_dpo"
    target: str = "x0"  # of inversion_dpo: x0, transition, reference
    beta: float = 2000.0
    link: str = "sigmoid"  # what becomes of the logit: sigmoid, hinge, ipo
    label_smoothing: float = 0.0  # share of labels taken to be wrong (conservative DPO)
    soft_labels: bool = False  # weigh pairs by how likely the winner is the better, if data say
    safeguard: bool = False  # hold back the loser where it would raise the winner's error
    weighting: str = "uniform"  # of noise levels: uniform, min_snr, transition, velocity
    states: int = 1  # states of each pair per step
    guidance_scale: float = 1.0  # train the prediction under this guidance, as it will be sampled
    t_min: float = 0.0  # train on noise levels in this part of the schedule,
    t_max: float = 1.0  # 0 clean to 1 pure noise


@dataclass
class PolicyConfig:
    """What is trained; the reference is it switched off, or a copy where all weights are."""

    kind: str = "lora"  # lora, full, scene_graph
    rank: int = 16
    alpha: float = 16.0
    target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    dora: bool = False
    merge: bool = False  # also write the pipeline with the LoRA added, to OUTPUT/merged
    graph_tokens: int = 32  # of a new scene-graph encoder: most items and triples of a graph,
    graph_width: int = 128  # width and
    graph_layers: int = 3  # layers of its message passing


@dataclass
class TrainingConfig:
    """The optimizer's loop."""

    steps: int = 100
    batch_size: int = 32  # pairs per optimizer step, over all processes
    gradient_accumulation: int = 1  # parts that the batch is computed in
    optimizer: str = "adamw"  # adamw, adamw8bit (needs bitsandbytes and a GPU), adafactor
    learning_rate: float = 1e-4
    warmup: int = 10  # steps in which the rate rises to learning_rate
    lr_scheduler: str = "constant"  # after it; linear or cosine: falls to 0 at training.steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"  # no, bf16, fp16
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile the network
    seed: int = 0
    eval_every: int = 20  # steps between held-out measurements
    checkpoint_every: int = 50
    keep_checkpoints: int = 2  # the newest; the best by held-out score is kept besides
    max_skipped: int = 10  # steps of non-finite loss or gradient left out before the run stops
    tracker: str = "auto"  # beside metrics.jsonl: auto (tensorboard if installed), tensorboard,
    # wandb, trackio, none
    snapshot_every: int | None = None  # steps between copies of the policy, in OUTPUT/snapshots


@dataclass
class ParserConfig:
    """The vision-language model of the scorer scene-graph (docs/reference/scorers.md)."""

    url: str | None = None  # an OpenAI-compatible server's, up to /v1; its key: see the page
    model: str | None = None  # the server's name for it
    vocabulary: str | None = None  # JSON file of words; null: those of the prompts' graphs
    distractors: int = 30  # words of other prompts offered beside a prompt's own, of each kind
    max_tokens: int = 1500  # of an answer
    timeout: float = 120.0  # seconds for a request
    retries: int = 5  # of a request, after 429, 5xx and timeouts
    parallel: int = 4  # requests at once
    prompt_price: float | None = None  # of a million tokens
    completion_price: float | None = None


@dataclass
class EvaluationConfig:
    """Held-out prompts; policy and reference start from the same noise."""

    prompts: str = "asset:prompts-test.txt"  # or hf:OWNER/NAME:COLUMN (docs/how-to/evaluate.md)
    limit: int | None = 500
    seeds: int = 1  # images of each prompt
    scorer: Any = "scenes"  # names, comma-separated or a list, or module:function; null: none
    checkpoints: dict[str, str] = field(default_factory=dict)  # of scorers: name: PATH@REVISION
    parser: ParserConfig = field(default_factory=ParserConfig)  # of the scorer scene-graph
    preference: str = "warmth"  # the score that the pairs were labelled by
    sample_steps: int = 20
    guidance_scale: float = 4.0
    batch_size: int = 50
    seed: int = 1000


@dataclass
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    inversion: InversionConfig = field(default_factory=InversionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    build: BuildConfig = field(default_factory=BuildConfig)


def resolve(path: str) -> str:
    """Turn ``asset:NAME`` into the packaged file's path; anything else is returned as it is."""
    return str(PACKAGE / "assets" / path[6:]) if path.startswith("asset:") else path


def known_keys() -> list[str]:
    """Every dotted key of the configuration."""
    tree: Any = OmegaConf.to_container(OmegaConf.structured(Config))
    return [f"{group}.{key}" for group, part in tree.items() for key in part]


def preset_path(name: str) -> Path:
    """A YAML file by path, or a packaged preset by name; ConfigError if neither exists."""
    if Path(name).is_file():
        return Path(name)
    if (PRESETS / f"{name}.yaml").is_file():
        return PRESETS / f"{name}.yaml"
    names = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
    raise ConfigError(f"no configuration {name!r}: give a YAML file or one of: {names}")


def load_config(preset: str | None, overrides: list[str]) -> Config:
    """Defaults, then the preset, then ``key=value`` overrides; ConfigError names what is wrong."""
    from inversion_dpo.run.config_checks import validate

    merged = OmegaConf.structured(Config)
    source = "defaults"
    try:
        if preset is not None:
            source = str(preset_path(preset))
            merged = OmegaConf.merge(merged, _plain(OmegaConf.load(source)))
        for override in overrides:
            source = f"override {override!r}"
            if "=" not in override:
                raise ConfigError(f"{source}: write it as key=value, e.g. training.steps=200")
            merged = OmegaConf.merge(merged, _plain(OmegaConf.from_dotlist([override])))
        config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_explain(error)}") from error
    except (YAMLError, OSError, UnicodeError, RecursionError) as error:
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"{source} is no YAML that can be read ({first})") from error
    if config.training.mixed_precision == "False":  # what YAML reads a bare no as
        config.training.mixed_precision = "no"
    validate(config)
    return config


def _plain(loaded: Any) -> Any:
    """Settings as written: of keys and values, without OmegaConf's ``${...}``, which would copy
    the environment, and with it tokens, into a run's files.
    """  # noqa: D205
    if not isinstance(loaded, DictConfig):
        raise ConfigError("a configuration is keys and values, e.g. training: {steps: 200}")
    if "${" in str(OmegaConf.to_container(loaded, resolve=False)):
        raise ConfigError(
            "${...} is not taken in a configuration: write the value itself "
            "(interpolation would copy the environment into the run)"
        )
    return loaded


def _explain(error: OmegaConfBaseException) -> str:
    message = str(error).splitlines()[0]
    match = re.search(r"Key '(\w+)' (?:is )?not in '(\w+)'", message)
    if not match:
        return f"{error.full_key or ''}: {message}".lstrip(": ")
    key = error.full_key or match[1]
    groups = {k.split(".")[0] for k in known_keys()}
    near = difflib.get_close_matches(key, known_keys() if "." in key else groups, n=1, cutoff=0.3)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
