"""Facts for clients of the Triton models: as parameters of the ensemble, and as the repository's README."""

from __future__ import annotations

from mdnet_engines.bundle.manifest import Manifest, PlanSet
from mdnet_engines.errors import printable


def preprocessing(manifest: Manifest) -> list[str]:
    """How an image file becomes the ensemble's input, step by step: the words for `mdnet_rt.images.preprocess`."""
    made = manifest.preprocessing
    size, draft = made.image_size, made.jpeg_draft
    if made.to_srgb:
        colours = (
            "convert its colours from the file's ICC profile to sRGB (relative colorimetric, black point compensation)"
        )
    else:
        colours = "leave its colours as they are stored: colour profiles are not applied"
    draft_of = (
        f"decode; a JPEG at the smallest of 1, 1/2, 1/4 and 1/8 of its size that keeps both sides at {draft * size} "
        "pixels or more (Pillow's draft)"
    )
    square = "the central square"
    if made.face is not None:
        draft_of = "decode"
        square = (
            f"the square around the face that YuNet finds, its side {made.face:g} times the longer side of the face, "
            "turned so that the eyes are level,"
        )
    return [
        draft_of,
        "convert to 8-bit RGB, transparency on white, 16-bit grey by its high byte",
        "turn upright by the EXIF orientation",
        f"resize {square} to {size} x {size} in one step (Pillow's bicubic, antialiased)",
        colours,
        "do not normalise: that is inside the graphs",
    ]


def facts(manifest: Manifest) -> dict[str, str]:
    """How an image becomes the input, the score's scale, and whose weights these are, for programs."""
    made = manifest.preprocessing
    return {
        "bundle": manifest.digest(),
        "preset": manifest.preset,
        "precision": manifest.precision,
        "weights": manifest.provenance.weights,
        "image_size": str(made.image_size),
        "layout": "uint8 [image_size, image_size, 3], rows first, RGB",
        "preprocessing": "; then ".join(preprocessing(manifest)),
        "resample": made.resample,
        "crop": made.crop,
        **({"face": f"{made.face:g}"} if made.face is not None else {}),
        "jpeg_draft": str(made.jpeg_draft),
        "colour": made.colour,
        "score_minimum": f"{manifest.score.minimum:g}",
        "score_maximum": f"{manifest.score.maximum:g}",
        "licenses": "; ".join(manifest.licenses),
    }


def readme(manifest: Manifest, name: str, models: list[str], max_batch_size: int, served: list[str]) -> str:
    """The README of a repository.

    Args:
        name: the ensemble's.
        models: what it runs, in order.
        served: what there is to say of how the models are run, a line each.
    """
    made, weights = manifest.preprocessing, manifest.provenance.weights
    size = made.image_size
    find_box = "" if made.face is None else f", find_box=mdnet_rt.images.face_crop.FaceFinder({made.face:g})"
    notes = [f"bundle {manifest.digest()}", f"{manifest.preset}, {manifest.precision}, {weights} weights", *served]
    if weights != "checkpoint":
        notes.append("**The scores mean nothing for real people.**")
    steps = "\n".join(f"{number}. {step}" for number, step in enumerate(preprocessing(manifest), start=1))
    return f"""# {name}: MD-Net, from a preprocessed face image to a score

Written by `mdnet-export triton`. Call the ensemble `{name}`; it runs {", ".join(f"`{model}`" for model in models)}.

| | name | type | shape |
| --- | --- | --- | --- |
| input | `image` | UINT8 | [n, {size}, {size}, 3], RGB, n from 1 to {max_batch_size} |
| output | `score` | FP32 | [n, 1], from {manifest.score} |

## From an image file to the input

{steps}

In Python `mdnet_rt.images.preprocess.load_image(path, {size}, to_srgb={made.to_srgb}{find_box})` does all of it.

## These models

{_listed(notes)}

## Licences

{_listed(manifest.licenses)}
"""


def notes_on_serving(plans: PlanSet | None, sizes: list[int], *, library: str | None = None) -> list[str]:
    """What there is to say of how the models are run.

    Args:
        sizes: those that plans run at.
        library: the native library's path where the server runs.
    """
    if plans:
        padded = (
            f"Plans run at {', '.join(map(str, sizes))} images, as CUDA graphs that Triton captures when it loads "
            "them; other batches are padded. 'unable to record CUDA graph' in Triton's log means that they are not."
        )
        if plans.compatible:
            return [
                f"The plans are native code for TensorRT {plans.version} and later, on GPUs from Ampere on. They bring "
                "a runtime of their own: start Triton with --backend-config=tensorrt,version-compatible=true.",
                padded,
            ]
        built_for = f"TensorRT {plans.version} on {plans.gpu or plans.target}"
        return [f"The plans are native code for {built_for}; another version or GPU refuses them.", padded]
    if library:
        return [f"ONNX Runtime (1.20 or newer) loads {library}: the server must see this repository there."]
    return []


def _listed(lines: list[str]) -> str:
    return "\n".join(f"- {printable(line)}" for line in lines)
