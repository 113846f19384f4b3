"""Every setting: its type, its limits, its default, when it has an effect, and one plain sentence.

``--help``, errors, ``config`` and the settings page are made of it, of ``evaluation_fields.py`` and
of ``build_fields.py``.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, Strict

from inversion_dpo.run.build_fields import BuildConfig as BuildConfig
from inversion_dpo.run.evaluation_fields import EvaluationConfig as EvaluationConfig
from inversion_dpo.run.evaluation_fields import ParserConfig as ParserConfig
from inversion_dpo.run.limits import ConfigError as ConfigError
from inversion_dpo.run.limits import (
    Count,
    Effect,
    Few,
    Fraction,
    Group,
    Guidance,
    GuidanceOr0,
    Minority,
    Natural,
    NotNegative,
    Positive,
    Seed,
    Shape,
    Share,
    Side,
    Switch,
    Weight,
    settings,
)

_INVERTED = Effect("inversion or inversion.reconstruct=true")
_REFINED = Effect("refined or inversion.reconstruct=true")
_DRAWN = Effect("draws")
_ON_GRID = Effect("grid or inversion.reconstruct=true")
_LORA = Effect("policy.kind=lora")
_HALF = "model.dtype!=float32 and training.mixed_precision=no"
_NARROW = Effect(f"policy.kind=lora and policy.dora=false and {_HALF}")
_NEW_ENCODER = Effect("policy.kind=scene_graph and model.scene_graph=null")
_WITH_GRAPHS = Effect("policy.kind=scene_graph or model.scene_graph!=null")
Named = Literal["smpo", "dspo", "mapo", "dmpo", "nft", "kto", "sft", "denoising"]  # also losses


@settings
class ModelConfig:
    """The pipeline that is aligned."""

    path: str = "asset:pipeline"
    """Pipeline: folder, OWNER/NAME on the hub, or .safetensors file. asset:pipeline is embedded."""
    revision: str | None = None
    """Branch, tag or commit of a pipeline on the hub; set it to pin the weights."""
    variant: str | None = None
    """Variant of the weight files, for example fp16; set it if the folder holds only that one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the frozen weights; bfloat16 halves their memory."""
    quantize: Literal["int8", "fp8", "nf4"] | None = None
    """Hold the frozen network in 8 bits (int8, fp8) or 4 (nf4), for a LoRA; null: model.dtype."""
    quantize_text: Literal["int8", "fp8", "nf4"] | None = None
    """The same for the text encoders, which are on the card while pairs and prompts are encoded."""
    offload: Switch = False
    """Keep the blocks of network and text encoders in main memory; weights come when used."""
    resolution: Side | Shape = 64
    """Side in pixels of the square whose area all images get, or WIDTHxHEIGHT for one size."""
    vae: str | None = None
    """Another autoencoder: file, folder or hub id; SDXL needs one that is safe in float16."""
    network: str | None = None
    """Another UNet or transformer: file, folder or hub id, for example a published DPO model."""
    config: Annotated[str | None, Effect(r"model.path=.*\.safetensors")] = None
    """Folder or hub id that says how a single file's networks are built; null: the usual one."""
    lora: str | None = None
    """A LoRA to start from, a file, folder or hub id; it becomes part of the reference."""
    t5: Switch = True
    """Whether Stable Diffusion 3 loads its T5 text encoder; false saves memory."""
    guidance_embed: GuidanceOr0 = 1.0
    """FLUX.1 and FLUX.2 dev only: guidance as the network's input, in inversion and in training."""
    scene_graph: str | None = None
    """Folder of a trained scene-graph encoder; scene graphs then condition the model."""
    prompt_chunks: Few = 1
    """Chunks of 75 tokens that SD1, SD2 and SDXL read of a prompt; raise it for long prompts."""


@settings
class DataConfig:
    """The preference pairs, and how they are read (docs/reference/formats.md)."""

    pairs: str = "asset:taste.parquet"
    """The pairs: a file, a folder, or hf:OWNER/NAME, which is streamed from the hub."""
    format: Literal[
        "auto",
        "parquet",
        "table",
        "webdataset",
        "dataset",
        "annotated",
        "folders",
        "thumbs",
        "hpdv3",
    ] = "auto"
    """Format of the pairs; name it if a folder holds several. A table is CSV or JSON."""
    split: str = "train"
    """Split of a Hugging Face dataset, or of files in a folder: train-*.parquet, test-*.parquet."""
    revision: Annotated[str | None, Effect("data.pairs=hf:.*")] = None
    """Branch, tag or commit of a dataset on the hub; set it to pin the pairs."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column names, ours to yours: `data.columns.caption=text` reads captions from column text."""
    root: str | None = None
    """Folder of the images that a table names, if they do not lie beside it; paths stay in it."""
    ranking: Literal["best_worst", "adjacent", "all"] = "best_worst"
    """Which images of a ranking of three or more become pairs."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens at a row that cannot be used: stop, or leave it out and count it."""
    allow_giveaways: Switch = False
    """Train even if shape, size, format or compression of the files tells winners from losers."""
    limit: Count | None = None
    """Use only so many pairs from the start; null uses all."""
    fit: Literal["drop", "pad", "crop"] = "drop"
    """How images fill their size: crop cuts, pad adds grey, drop leaves out what loses over 1/8."""
    mask: Literal["given", "differ", "none"] = "given"
    """Where errors count: in the data's mask, if any; where the two images differ; everywhere."""
    flip: Switch = False
    """Mirror half of the pairs, both images alike, unless the caption says left or right."""
    holdout: Annotated[float, Strict(), Field(gt=0, lt=1)] = 0.1
    """Share of the pairs that is never trained on and measures held-out accuracy."""
    prompt_dropout: Share = 0.0
    """Share of the pairs shown without their prompt, to train what guidance subtracts as well."""
    graph_dropout: Annotated[Share, _WITH_GRAPHS] = 0.0
    """Share of the pairs shown without their scene graph."""
    caption_dropout: Annotated[Share, _WITH_GRAPHS] = 0.0
    """Share of the pairs shown with their scene graph and without their caption."""
    label_noise: Annotated[Share, Effect("labels")] = 0.0
    """Share of the training pairs whose labels are swapped; for control experiments only."""


@settings
class InversionConfig:
    """How trajectories are recovered, once, under the frozen reference."""

    steps: Annotated[Few, Effect("steps or inversion.reconstruct=true")] = 20
    """Inversion steps N; more are more exact, and take more time and disk space."""
    spacing: Annotated[Literal["sampler", "even"], _ON_GRID] = "sampler"
    """Timesteps of the inversion: those the sampler visits, or evenly spaced over all."""
    guidance_scale: Annotated[Guidance, Effect("inverts or inversion.reconstruct=true")] = 1.0
    """Classifier-free guidance of the inversion; 1 is none, and the only value that is exact."""
    fixed_point_iterations: Annotated[int, Strict(), Field(ge=0, le=1000), _REFINED] = 0
    """Fixed-point iterations of every inversion step; 0 is plain DDIM inversion."""
    t_start: Annotated[float, Strict(), Field(ge=0, le=0.5), _INVERTED] = 0.0
    """Share of the schedule below which noise is added instead of inverting."""
    keep: Annotated[Count | None, Effect("kept or inversion.reconstruct=true")] = None
    """States kept on disk for each pair; null keeps all. An even number takes less room."""
    reconstruct: Switch = False
    """Also sample back from the recovered noise, which shows what the reference cannot draw."""
    max_error: NotNegative | None = None
    """Leave out pairs whose relative reconstruction error is larger; needs reconstruct=true."""
    batch_size: Count = 64
    """Images of a shard: inverted at once as a GPU's memory allows, a few at once elsewhere."""
    cache: str | None = None
    """Folder for what is encoded and inverted, which several runs may share; null: OUTPUT/cache."""

    def folder(self, output: Path) -> Path:
        """Return the folder of caches of a run."""
        return Path(self.cache).expanduser() if self.cache else output / "cache"

    @property
    def start(self) -> int:
        """Index on the grid of the highest state that is x_0 with noise added; 0: none is."""
        return round(self.t_start * self.steps)


@settings
class ObjectiveConfig:
    """The method and its loss."""

    name: Literal["inversion_dpo", "inversion_dpo_released", "diffusion_dpo", "inpo", Named] = (
        "inversion_dpo"
    )
    """The method; docs/explanation/objectives.md has the formula and the source of each."""
    loss: Literal["dpo", "dpo_bounded", "dpo_released", Named] | None = None
    """Another loss than the method's own; null keeps it."""
    path: (
        Literal["trajectory", "noise", "stepped", "line", "known", "released", "policy", "renoise"]
        | None
    ) = None
    """Where the noisy states come from, if not from the method's own path."""
    coupling: Annotated[Share, Effect("coupled")] = 1.0
    """Share rho of the image's own noise; the rest is fresh: rho own + sqrt(1 - rho^2) fresh."""
    target: Annotated[Literal["x0", "transition", "reference"] | None, Effect("target")] = None
    """What the policy should predict at a state, if not the method's own target."""
    beta: Annotated[
        Annotated[float, Strict(), Field(gt=0, le=10**7)] | Literal["auto"] | None, Effect("beta")
    ] = None
    """Tie to the reference, larger is closer; null: the loss's usual, 2000 for dpo; auto adapts."""
    gradient_factor: Annotated[
        float, Strict(), Field(gt=0, lt=0.5), Effect("beta and objective.beta=auto")
    ] = 0.2
    """Mean gradient factor, sigmoid(-logit), below which beta=auto lowers beta."""
    link: Annotated[Literal["sigmoid", "hinge", "ipo"], Effect("link")] = "sigmoid"
    """Function from a pair's logit to its loss."""
    label_smoothing: Annotated[Minority, Effect("label_smoothing")] = 0.0
    """Share of the labels taken to be wrong (conservative DPO); raise it for noisy labels."""
    liked_share: Annotated[Fraction | None, Effect("liked_share")] = 0.5
    """Share of KTO's loss that liked images have, however many; null weighs each image alike."""
    soft_labels: Annotated[Switch, Effect("soft_labels")] = False
    """Weigh each pair by the probability p, given in the data, that its winner is better."""
    gap_weighted: Annotated[Switch, Effect("gap and objective.soft_labels=false")] = False
    """Scale each pair's beta by 2p - 1, at mean 1, p as in soft_labels: sure pairs count more."""
    reference_every: Annotated[
        Count | None, Effect("reference and anew and policy.kind!=scene_graph")
    ] = None
    """Every so many steps the policy becomes the new reference; null: never."""
    safeguard: Annotated[Switch, Effect("safeguard")] = False
    """Hold the loser's gradient back where it would raise the winner's error."""
    safeguard_margin: Annotated[
        float, Strict(), Field(ge=0, lt=1), Effect("safeguard and objective.safeguard=true")
    ] = 0.0
    """Share by which the loser's gradient, as the safeguard leaves it, is lowered further."""
    anchor: Annotated[Weight, Effect("terms")] = 0.0
    """Weight of the squared distance to the reference's predictions, added to the loss."""
    sft_weight: Annotated[Weight, Effect("terms")] = 0.0
    """Weight of the denoising loss on winners, added to the loss."""
    weighting: Annotated[Literal["uniform", "min_snr", "transition", "velocity"], _DRAWN] = (
        "uniform"
    )
    """How much each noise level counts."""
    states: Annotated[Few, _DRAWN] = 1
    """States of each pair in a training step; more give less noisy gradients and take longer."""
    guidance_scale: Guidance = 1.0
    """Guidance under which the prediction is trained; 1 trains the conditional prediction."""
    t_min: Annotated[float, Strict(), Field(ge=0, lt=1), _DRAWN] = 0.0
    """Lowest noise level that is trained on: 0 is the clean image."""
    t_max: Annotated[float, Strict(), Field(gt=0, le=1), _DRAWN] = 1.0
    """Highest noise level that is trained on: 1 is pure noise."""


@settings
class PolicyConfig:
    """What is trained."""

    kind: Literal["lora", "full", "scene_graph"] = "lora"
    """What is trained: a LoRA, all weights of the network, or a scene-graph encoder."""
    rank: Annotated[Few, _LORA] = 16
    """Rank of the LoRA; a larger rank can learn more and takes more memory."""
    alpha: Annotated[float, Strict(), Field(gt=0, le=10_000), _LORA] = 16.0
    """Scale of the LoRA: its update is multiplied by alpha / rank."""
    target_modules: Annotated[list[str] | None, Field(min_length=1), _LORA] = None
    """Layers that get a LoRA: name endings, or one pattern after ^; null takes the family's own."""
    dora: Annotated[Switch, _LORA] = False
    """Also train the magnitudes of the weights (DoRA)."""
    adapter_dtype: Annotated[Literal["float32", "model"], _NARROW] = "float32"
    """Precision a LoRA computes in; model: that of the frozen weights. Its own stay float32."""
    merge: Switch = False
    """Also write the pipeline with the policy's weights merged, to OUTPUT/merged."""
    graph_tokens: Annotated[Few, _NEW_ENCODER] = 32
    """Most objects and relations of a graph that a new scene-graph encoder takes."""
    graph_width: Annotated[Few, _NEW_ENCODER] = 128
    """Width of a new scene-graph encoder's layers."""
    graph_layers: Annotated[Few, _NEW_ENCODER] = 3
    """Message-passing layers of a new scene-graph encoder."""


@settings
class TrainingConfig:
    """The optimizer's loop."""

    steps: Count = 100
    """Optimizer steps in all; raise it to continue a finished run."""
    batch_size: Count = 32
    """Pairs of an optimizer step, over all processes and parts."""
    gradient_accumulation: Count = 1
    """Parts in which a batch is computed; raise it if memory runs out."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    """The optimizer; adamw8bit needs bitsandbytes and a GPU, adafactor needs little memory."""
    learning_rate: Annotated[float, Strict(), Field(gt=0, le=1)] = 1e-4
    """Highest learning rate; lower it if held-out accuracy falls while the loss falls."""
    warmup: Natural = 10
    """Steps in which the learning rate rises from zero to learning_rate."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to zero at the last step."""
    weight_decay: Annotated[float, Strict(), Field(ge=0, le=10)] = 0.0
    """Weight decay of the optimizer."""
    max_grad_norm: Positive = 1.0
    """Gradients of a larger norm are scaled down to this norm."""
    mixed_precision: Annotated[
        Literal["no", "bf16", "fp16"], BeforeValidator(lambda v: "no" if v is False else v)
    ] = "no"
    """Precision of the network's computations; bf16 is faster on GPUs that have it."""
    gradient_checkpointing: Switch = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: Annotated[
        Literal["no", "default", "reduce-overhead"],
        BeforeValidator(lambda v: ("default" if v else "no") if isinstance(v, bool) else v),
    ] = "no"
    """Compile the blocks that repeat, once each; reduce-overhead also records CUDA graphs."""
    seed: Seed = 0
    """Seed of the training: batches, noise levels, held-out pairs and new weights."""
    eval_every: Count = 20
    """Steps between two measurements on held-out pairs."""
    checkpoint_every: Count = 50
    """Steps between two checkpoints, from which an interrupted run resumes."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that are kept; the best by held-out score is kept besides."""
    max_skipped: Natural = 10
    """Steps without a finite loss or gradient that are left out before the run stops."""
    tracker: Literal["auto", "tensorboard", "wandb", "trackio", "none"] = "auto"
    """Where metrics go besides metrics.jsonl; auto is TensorBoard if it is installed."""
    snapshot_every: Count | None = None
    """Steps between two copies of the policy in OUTPUT/snapshots; null makes none."""


@settings
class Config:
    """A whole run."""

    model: Group[ModelConfig] = field(default_factory=ModelConfig)
    data: Group[DataConfig] = field(default_factory=DataConfig)
    inversion: Group[InversionConfig] = field(default_factory=InversionConfig)
    objective: Group[ObjectiveConfig] = field(default_factory=ObjectiveConfig)
    policy: Group[PolicyConfig] = field(default_factory=PolicyConfig)
    training: Group[TrainingConfig] = field(default_factory=TrainingConfig)
    evaluation: Group[EvaluationConfig] = field(default_factory=EvaluationConfig)
    build: Group[BuildConfig] = field(default_factory=BuildConfig)
