"""docs/backbones.md: what of timm and Hugging Face is taken, and why the rest is not.

    python -m tests.models.backbones.page

writes the page: it builds every model of timm on the meta device, which takes minutes.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from tests.models.backbones.test_language import KINDS

PAGE = Path(__file__).parents[3] / "docs" / "backbones.md"
TAKEN = {  # timm's classes that are taken by their blocks, and names to show
    "VisionTransformer": "vit_tiny_patch16_224, vit_small_patch14_reg4_dinov2, vit_base_patch16_siglip_224",
    "VisionTransformerDistilled": "deit_tiny_distilled_patch16_224",
    "Beit": "beit_base_patch16_224, beitv2_base_patch16_224",
    "Eva": "eva02_tiny_patch14_224, vit_small_patch16_dinov3, vit_pe_core_tiny_patch16_384",
    "VisionTransformerRelPos": "vit_relpos_small_patch16_224",
}
WHOLE = {
    "Cait": "cait_xxs24_224",
    "ConVit": "convit_tiny",
    "ConvMixer": "convmixer_768_32",
    "DeepseekVitClassifier": "deepseek_vit_412m",
    "DeepseekVitEncoder": "deepseek_vit_412m_enc",
    "MlpMixer": "mixer_s32_224, gmlp_ti16_224, resmlp_12_224",
    "Qwen3VitClassifier": "qwen3_vit_88m",
    "Qwen3VitEncoder": "qwen3_vit_88m_enc",
    "VisionTransformerSAM": "samvit_base_patch16",
    "Xcit": "xcit_nano_12_p16_224",
}
REST = {  # reasons, and names to show
    "has no patch embedding": "resnet18, naflexvit_base_patch16_gap",
    "makes no plain tokens of an image": "convnext_atto, hiera_tiny_224",
    "does not keep its tokens": "swin_tiny_patch4_window7_224, mvitv2_tiny",
    "does not run on a plain image": "crossvit_tiny_240",
}
Counts = dict[str, int]  # names of each class in TAKEN and WHOLE, and of each reason in REST

BEFORE = """# Backbones

Which networks of other libraries run on tokens or graphs, without code of your own. See
[Symmetrize your own model](your-model.md) for whole models, and the [reference](api/models.md) for all arguments.
`python -m tests.models.backbones.page` makes this page.

## Vision transformers of timm

`psf.models.timm_backbone(name, grid=...)` takes these models by name. Their numbers are those of timm on the same tokens.

```python
import torch
import probsym_fast as psf

sizes = {"depth": 2, "embed_dim": 16, "num_heads": 2}  # for a quick example
backbone = psf.models.timm_backbone("vit_small_patch16_dinov3", grid=(2, 5), **sizes)
assert backbone(torch.randn(4, 3, 10, 16)).shape == (4, 3, 16)
```

"""

AFTER_TAKEN = """
- Class, distillation and register tokens, positions, all kinds of blocks, norms and pools are timm's.
- `grid` may be a rectangle. Positions are resampled to it; rotary ones are made for it.
- `tokens` is for sequences. Relative and rotary positions need a grid: `grid=(1, tokens)` is a line.
- Weights come from timm, or from a local file under the names of timm or of their authors.
- A model in place of the name, such as a trained classifier, gives the backbone with its own parameters:
  see [Images](images.md#any-timm-vit).
- With few tokens read, the last block computes its feed-forward only for these, and in plain ViTs and BEiTs its queries.
  Parallel blocks, and blocks with norms after the layers, compute all tokens.
- `patch_dropout` needs positions that can be left out: not those of BEiT and RelPos. A given model's own is taken over.

These run whole, in timm's own forward pass, with the tokens in place of the patch embedding's. They compute all tokens, and
drop no patches. That an image and its tokens give the same numbers is checked when the backbone is built:

"""

AFTER_WHOLE = """
The others are refused, with the reason:

"""

AFTER_REST = """
## Language models of Hugging Face

`psf.models.hf_backbone(name_or_config, tokens=...)` takes each encoder or decoder that accepts `inputs_embeds`. It runs the
model once, to check. The test suite compares these with transformers on random weights, with padding and every read:

"""

AFTER = """
```python
import transformers

config = transformers.LlamaConfig(
    vocab_size=8,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
)
backbone = psf.models.hf_backbone(
    config,
    pretrained=False,
    tokens=10,
    read="mean",
    bidirectional=True,
)
lengths = torch.randint(1, 11, (4, 3))  # of padded sequences
assert backbone(torch.randn(4, 3, 10, 16), lengths).shape == (4, 3, 16)
```

- Positions and attention are the model's. Word embeddings and pooler are dropped.
- A decoder is causal: a token sees those before it. `bidirectional=True` changes that where the library can.
- `backbone.out_width` may differ from `backbone.width`, as in ALBERT.

## Graph networks of PyTorch Geometric

`psf.models.PyGBackbone(net)` takes each module `net(x, edge_index, ...)` that works on batches. See
[Symmetrize your own model](your-model.md#a-network-of-pytorch-geometric).
"""


def counted() -> tuple[Counts, int]:
    """Of every name that timm lists, and how many these are."""
    import timm

    names = timm.list_models()
    return dict(Counter(sorted_as(name) for name in names)), len(names)


def sorted_as(name: str) -> str:
    """A key of TAKEN, WHOLE or REST."""
    import timm
    import torch

    from probsym_fast.models.backbones.timm_models import taken

    with torch.device("meta"):
        model = timm.create_model(name)
    found = taken(model)
    return next(key for key in REST if key in found) if isinstance(found, str) else type(model).__name__


def page(version: str, counts: Counts, names: int) -> str:
    taken = sum(counts[kind] for kind in (*TAKEN, *WHOLE))
    text = BEFORE + f"timm {version} lists {names} names; {taken} of them are taken. These by their blocks:\n\n"
    text += _table("class of timm", TAKEN, counts, "`") + AFTER_TAKEN
    text += _table("class of timm", WHOLE, counts, "`") + AFTER_WHOLE
    text += _table("reason", REST, counts, "") + AFTER_REST
    text += "| model | causal |\n|---|---|\n"
    text += "".join(f"| {kind} | {'yes' if causal else 'no'} |\n" for kind, (_, _, causal) in KINDS.items())
    return text + AFTER


def _table(title: str, rows: dict[str, str], counts: Counts, mark: str) -> str:
    text = f"| {title} | names | such as |\n|---|---|---|\n"
    return text + "".join(f"| {mark}{key}{mark} | {counts[key]} | {_code(shown)} |\n" for key, shown in rows.items())


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def read(text: str) -> tuple[str, Counts, int]:
    """version, counts and names of a page."""
    found = re.search(r"timm (\S+) lists (\d+) names", text)
    assert found is not None
    rows = dict(re.findall(r"^\| `?([^|`]+?)`? \| (\d+) \|", text, re.MULTILINE))
    return found[1], {key: int(rows[key]) for key in (*TAKEN, *WHOLE, *REST)}, int(found[2])


if __name__ == "__main__":
    import timm

    PAGE.write_text(page(timm.__version__, *counted()), encoding="utf-8")
