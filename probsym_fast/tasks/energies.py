"""Energies and forces of molecules of one's own: a Transformer over atoms, symmetrized over rotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from probsym_fast.batches import PointClouds
from probsym_fast.data import Conformations
from probsym_fast.distributions import Distribution, Frame, Identity, Learned, Normal, Uniform, VectorNeurons
from probsym_fast.distributions.vector_layers import EdgeConvolution
from probsym_fast.groups import Euclidean, Group, SpecialEuclidean
from probsym_fast.models import NodeVectors, OnePass, PooledReadout, Symmetrized, Transformer, energy_and_forces
from probsym_fast.tasks.own_data import Splitting, splits_of
from probsym_fast.tasks.trials import InTrials
from probsym_fast.training import configuration
from probsym_fast.training.configuration import COUNT, NOT_NEGATIVE, SHARE, at_least
from probsym_fast.training.settings import SAMPLES_LIMITS, TRAINING_LIMITS, Run, Samples, Training

LONGEST = 8.0  # Å, of the waves
GROUPS = {"O3": Euclidean, "SO3": SpecialEuclidean}
LIMITS = {
    "backbone.width": COUNT,
    "backbone.layers": COUNT,
    "backbone.heads": COUNT,
    "backbone.feedforward": COUNT,
    "backbone.waves": at_least(0),
    "distribution.width": COUNT,
    "distribution.neighbors": COUNT,
    "distribution.dropout": SHARE,
    "distribution.noise": NOT_NEGATIVE,
    "energy_weight": NOT_NEGATIVE,
    "force_weight": NOT_NEGATIVE,
    "split.valid": SHARE,
    "split.test": SHARE,
    **SAMPLES_LIMITS,
    **TRAINING_LIMITS,
}


@dataclass
class AtomTransformer:
    """The network that is symmetrized: a Transformer with a token per atom, and the sum of the atoms' outputs.

    Args:
        width: hidden width.
        layers: number of layers.
        heads: attention heads.
        feedforward: width of the feed-forward layers.
        waves: wavelengths, from 8 Å downwards, of sines and cosines of the coordinates that are inputs too.
    """

    width: int = 64
    layers: int = 8
    heads: int = 4
    feedforward: int = 64
    waves: int = 4

    def build(self, types: int) -> Transformer:
        """types: features of an atom besides its coordinates."""
        inputs = 3 + types + 6 * self.waves
        return Transformer(inputs, self.width, self.layers, self.heads, self.feedforward, tokens=None, out_features=1)


@dataclass
class LearnedFrames:
    """The learned distribution (method ps and canonical): Vector Neurons on atoms with their types.

    Args:
        width: vectors per atom.
        neighbors: number of nearest neighbours.
        dropout: dropout of whole vectors.
        noise: standard deviation of the noise on positions and on the frame's columns, Å (canonical: 0).
    """

    width: int = 8
    neighbors: int = 4
    dropout: float = 0.0
    noise: float = 0.1

    def build(self, method: str, group: Group, types: int) -> Distribution:
        """The distribution of a method: ps, ga, pca, canonical or none. types: features per atom.

        Forces through the axes of pca grow without bound as two variances of a molecule come close: a symmetric one, such as
        a square, has very large forces.
        """
        if method == "ga":
            return Uniform(group)
        if method == "pca":
            return Frame(group)
        if method == "none":
            return Identity(group)
        settings = {"neighbors": self.neighbors, "dropout": self.dropout, "scores": False, "features": types}
        noisy = {"column_noise": 1.0}  # molecules of two atoms, or in a plane
        network = VectorNeurons(channels=1, width=self.width, **settings, **noisy)  # type: ignore[arg-type]
        return Learned(group, network, Normal(0.0 if method == "canonical" else self.noise))


def _samples() -> Samples:
    return Samples(train=8, valid=8, test=16, trials=3)


def _training() -> Training:
    return Training(epochs=100, batch=32, lr=1e-3, weight_decay=0.0, decay="linear", entropy=0.0, clip=1.0)


@dataclass
class EnergiesConfig(Run):
    """Energies, maybe with forces, of molecules of your own as PyTorch Geometric's Data: pos (n, 3), z (n,), an energy.

    Args:
        task: name of the task.
        data: a folder with train.pt, valid.pt and test.pt, or one file; each holds a list of Data or an InMemoryDataset.
        split: how one file is cut into three.
        energy: name of the field with the energy, () or (1,).
        forces: name of the field with the forces (n, 3), in units of energy over those of pos; null: there are none.
        symmetry: "O3" or "SO3"; both remove translation.
        method: "ps" learned distribution, "ga" uniform, "pca" principal axes with random signs (very large forces
            where two variances are close), "canonical" learned without noise, one sample, "none" no group.
        energy_weight: weight of the energies' squared error. Both errors are divided by the forces' mean square in the
            training set (for energies: times 1 Å squared); without forces, by the energies' variance, and the weight is 1.
        force_weight: weight of the forces' squared error.
        backbone: the network that is symmetrized.
        distribution: settings of the learned distribution.
        samples: group elements per molecule.
        training: optimiser, epochs, devices.
    """

    of_method: ClassVar[dict[str, dict[str, Any]]] = {
        method: {"samples": {"train": 1, "valid": 1, "test": 1, "trials": 1}} for method in ("canonical", "none")
    }

    task: str = "energies"
    data: str | None = None
    split: Splitting = field(default_factory=Splitting)
    energy: str = "energy"
    forces: str | None = "force"
    symmetry: Literal["O3", "SO3"] = "O3"
    method: Literal["ps", "ga", "pca", "canonical", "none"] = "ps"
    energy_weight: float = 0.2
    force_weight: float = 1.0
    backbone: AtomTransformer = field(default_factory=AtomTransformer)
    distribution: LearnedFrames = field(default_factory=LearnedFrames)
    samples: Samples = field(default_factory=_samples)
    training: Training = field(default_factory=_training)


class AtomTokens(nn.Module):
    """A token per atom: `NodeVectors`, and sine and cosine of its coordinates in the frame: (B, S, n, 3 + F + 6 waves).

    Wavelengths are 8, 4, 2, ... Å. Products of waves of two atoms, as attention forms them, are waves of their distance
    vector. lengths: as in `NodeVectors`.
    """

    frequencies: Tensor

    def __init__(self, waves: int, lengths: bool):
        super().__init__()
        self.nodes = NodeVectors(lengths)
        self.register_buffer("frequencies", 2 * torch.pi / LONGEST * 2.0 ** torch.arange(waves))

    def forward(self, batch: PointClouds, group: Group, g: Any) -> tuple[Tensor, ...]:
        x, *others = self.nodes(batch, group, g)
        if len(self.frequencies):
            angles = (x[..., :3, None] * self.frequencies).flatten(-2)
            x = torch.cat([x, angles.sin(), angles.cos()], -1)
        return x, *others


class EnergyForces(Symmetrized):
    """A symmetrized energy and its forces in one Tensor, (B, 1 + n d). forces: False gives the energy only, (B, 1).

    The readout's energies are in units of `scale`, a buffer. In training mode the backbone runs step by step, since
    second derivatives then cost less; and the batch's statistics in Vector Neurons count as constants of the positions, so
    that forces are those of each molecule's energy, as in eval mode.
    """

    scale: Tensor

    def __init__(self, *parts: Any, scale: float, forces: bool, **settings: Any):
        super().__init__(*parts, **settings)
        self.forces = forces
        self.register_buffer("scale", torch.tensor(scale))
        self.train()

    def train(self, mode: bool = True) -> EnergyForces:
        super().train(mode)
        for part in self.modules():
            if isinstance(part, OnePass):
                part.one_pass = False if mode and self.forces else None
            elif isinstance(part, EdgeConvolution):
                part.detached_statistics = self.forces
        return self

    def forward(self, batch: Any, samples: int | None = None, generator: Any = None, **settings: Any) -> Any:
        if not self.forces:
            energy, penalties = super().forward(batch, samples, generator, **settings)
            return energy * self.scale, penalties
        energy, forces, penalties = energy_and_forces(self, batch, samples, generator, **settings)
        return torch.cat([energy, forces.flatten(1)], 1) * self.scale, penalties


class Conformers(Dataset):
    """Conformations as batches: an index tensor gives (PointClouds, target).

    Features are one-hot types. target (B, 1 + n 3): energy less the atoms' reference energies, and forces; NaN at atoms that
    are not there and where no forces are known. num_nodes is None where all molecules have as many atoms.
    """

    def __init__(self, data: Conformations, types: Tensor, references: Tensor):
        M, n = data.numbers.shape
        kinds = data.numbers[..., None] == types
        self.positions, self.features = data.positions.float(), kinds.float()
        self.num_nodes = None if bool((data.num_nodes == n).all()) else data.num_nodes
        energies = data.energies - kinds.sum(1).double() @ references
        forces = torch.where(data.numbers[..., None] > 0, data.forces, torch.nan)
        self.target = torch.cat([energies[:, None], forces.reshape(M, -1)], 1).float()

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: Any) -> tuple[PointClouds, Tensor]:
        counts = None if self.num_nodes is None else self.num_nodes[index]
        return PointClouds(self.positions[index], features=self.features[index], num_nodes=counts), self.target[index]


class Energies(InTrials):
    """Energies and forces; the forces are minus the gradient of the symmetrized energy.

    config: an `EnergiesConfig`. graphs: the data in place of `config.data`: lists of Data for "train", "valid" and "test", or
    one list that is split. Reference energies of the types are fitted to the training set by least squares; the model
    predicts what is left. Errors are reported in the data's units: "energy_mae", and "force_mae" over components.
    """

    Config: ClassVar[type] = EnergiesConfig
    measure = "error"
    whole_set_measures = True

    def __init__(self, config: Any, graphs: Mapping[str, Sequence[Any]] | Sequence[Any] | None = None):
        configuration.check(config, LIMITS)
        counts = {config.samples.train, config.samples.valid, config.samples.test}
        if config.method in ("canonical", "none") and counts != {1}:
            raise ValueError(f"config: method {config.method} takes 1 sample, got {config.samples}")
        if config.backbone.width % config.backbone.heads:
            got = f"{config.backbone.width}, got {config.backbone.heads}"
            raise ValueError(f"config: backbone.heads must divide backbone.width = {got}")
        self.config, self._given = config, graphs

    @property
    def figures(self) -> tuple[str, ...]:  # type: ignore[override]  # read-only here
        return ("test_energy_mae", "test_force_mae") if self.with_forces else ("test_energy_mae",)

    @property
    def with_forces(self) -> bool:
        return self.config.forces is not None and self.config.force_weight > 0

    @property
    def about(self) -> str:
        counts = " + ".join(str(len(some)) for some in self.conformations.values())
        return f"{counts} molecules of up to {self.conformations['train'].numbers.shape[1]} atoms"

    @cached_property
    def conformations(self) -> dict[str, Conformations]:
        """The data of each split, padded to the largest molecule."""
        config = self.config
        lists = splits_of(self._given, config.data, config.split)
        n = max(int(one.num_nodes) for some in lists.values() for one in some)
        return {name: conformations_of(some, n, config.energy, config.forces) for name, some in lists.items()}

    @cached_property
    def types(self) -> Tensor:
        """Atomic numbers that occur."""
        every = torch.cat([data.numbers.flatten() for data in self.conformations.values()]).unique()
        return every[every > 0]

    @cached_property
    def references(self) -> Tensor:
        """Energy of an atom of each type, float64: least squares on the training set, the shortest solution."""
        train = self.conformations["train"]
        counts = (train.numbers[..., None] == self.types).sum(1).double()
        return torch.linalg.lstsq(counts, train.energies[:, None], driver="gelsd").solution[:, 0]

    @cached_property
    def units(self) -> tuple[float, float]:
        """Standard deviation of the energies that are left, and root mean square of the forces' components."""
        values = self.dataset("train").target
        forces = values[:, 1:][~values[:, 1:].isnan()]
        units = values[:, 0].std(correction=0), forces.square().mean().sqrt()
        return tuple(float(x) if x > 0 else 1.0 for x in units)  # type: ignore[return-value]

    def group(self) -> Group:
        return GROUPS[self.config.symmetry](3)

    def model(self, fresh: bool = True) -> EnergyForces:
        config, types = self.config, len(self.types)
        backbone = config.backbone.build(types)  # first: a seed then gives it equal weights for every method
        distribution = config.distribution.build(config.method, self.group(), types)
        parts: tuple[nn.Module, ...] = backbone, AtomTokens(config.backbone.waves, self._ragged), PooledReadout("sum")
        scale = self.units[self.with_forces]
        settings = config.samples.settings() | {"scale": scale, "forces": self.with_forces}
        return EnergyForces(*parts, distribution, **settings)

    @property
    def _ragged(self) -> bool:
        return any(self.dataset(split).num_nodes is not None for split in self.conformations)

    def dataset(self, split: str) -> Conformers:
        return self._datasets[split]

    @cached_property
    def _datasets(self) -> dict[str, Conformers]:
        return {name: Conformers(data, self.types, self.references) for name, data in self.conformations.items()}

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        energy, force = self.units
        config, error = self.config, (prediction - target[:, : prediction.shape[1]]).square()
        if error.shape[1] == 1:
            return error[:, 0].mean() / energy**2
        loss = config.energy_weight / force**2 * error[:, 0].mean()
        known = ~target[:, 1:].isnan()
        squares = torch.where(known, error[:, 1:], 0).sum() / known.sum().clamp(min=1)
        return loss + config.force_weight / force**2 * squares

    def measures(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        error = (prediction - target[:, : prediction.shape[1]]).double().abs()
        found = {"energy_mae": error[:, 0].mean()}
        return found | ({"force_mae": error[:, 1:].nanmean()} if error.shape[1] > 1 else {})


def conformations_of(graphs: Sequence[Any], n: int, energy: str, forces: str | None) -> Conformations:
    """From Data with pos, z, an energy and maybe forces; padded to n atoms, NaN for forces that are not there."""
    M = len(graphs)
    numbers, positions = torch.zeros(M, n, dtype=torch.int64), torch.zeros(M, n, 3, dtype=torch.float64)
    energies, slopes = torch.zeros(M, dtype=torch.float64), torch.full((M, n, 3), torch.nan, dtype=torch.float64)
    for k, graph in enumerate(graphs):
        m = int(graph.num_nodes)
        wanted = {"pos": (m, 3), "z": (m,), energy: ()} | ({forces: (m, 3)} if forces else {})
        found = {}
        for name, shape in wanted.items():
            value = getattr(graph, name, None)
            if not isinstance(value, Tensor) or value.reshape(-1).shape[0] != torch.Size(shape).numel():
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"data: {name} of every molecule must be {shape}, here of {m} atoms, got {got}")
            if not value.isfinite().all():
                raise ValueError(f"data: {name} of every molecule must be finite, got NaN or infinity")
            found[name] = value.reshape(shape)
        if m and int(found["z"].min()) < 1:
            raise ValueError(f"data: z of every molecule must be atomic numbers >= 1, got {int(found['z'].min())}")
        numbers[k, :m], positions[k, :m], energies[k] = found["z"], found["pos"], found[energy]
        if forces:
            slopes[k, :m] = found[forces]
    return Conformations(numbers, positions, energies, slopes)
