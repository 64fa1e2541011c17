"""A vision transformer trained on upright digits, made invariant to quarter turns: without training, then fine-tuned."""

import argparse

import timm
import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits

import probsym_fast as psf

GROUP = psf.groups.Cyclic(4)


def scores(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(psf.Images(x), samples=4)[0] if isinstance(model, psf.Symmetrized) else model(x)


def train(model, x: torch.Tensor, y: torch.Tensor, epochs: int):
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    for index in (some for _ in range(epochs) for some in torch.randperm(len(x)).split(100)):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scores(model, x[index]), y[index]).backward()
        optimizer.step()
    return model.eval()


def draw(model, x: torch.Tensor, path: str) -> None:
    p, order = model.distribution.log_probabilities(psf.Images(x)).exp().sort(1, descending=True)
    seen = torch.cat([x[:, None], GROUP.act(order, x, "chw", inverse=True)], 1).flatten(0, 2).numpy()  # g^-1 x
    titles = [title for row in p.tolist() for title in ("image", *(f"p = {share:.2f}" for share in row))]
    figure, axes = pyplot.subplots(len(x), 5, figsize=(6, 1.4 * len(x)), squeeze=False, layout="constrained")
    for axis, picture, title in zip(axes.flat, seen, titles, strict=True):
        axis.imshow(picture, cmap="gray")
        axis.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def main(options: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(options.seed)
    x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    (x, upright), (y, answers) = (x.float().view(-1, 1, 8, 8) / 8 - 1).split([1200, 597]), y.split([1200, 597])
    turned = GROUP.act(torch.randint(4, (597, 1)), upright, "chw")[:, 0]
    net = train(timm.models.VisionTransformer(8, 2, 1, 10, embed_dim=48, depth=2, num_heads=3), x, y, options.epochs)
    found = {"bare, upright": scores(net, upright), "bare, turned": scores(net, turned)}
    found["post hoc, turned"] = scores(psf.symmetrize(net, GROUP).eval(), turned)  # the mean over the orbit
    model = train(psf.symmetrize(net, GROUP, distribution="learned"), x, y, options.epochs // 3)  # weighted by p(g|x)
    found["fine-tuned, turned"] = scores(model, turned)
    draw(model, turned[: options.images], options.picture)
    right = {name: (logits.argmax(1) == answers).float().mean().item() for name, logits in found.items()}
    print(*(f"{name}: {share:.1%}" for name, share in right.items()), sep="\n")
    return right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("epochs", 40), ("images", 6), ("seed", 0), ("picture", "images.png")):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    main(parser.parse_args())
