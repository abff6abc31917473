# Shapes: T tokens of a sample, those in the places of its images among them.
"""Images with text, for models that see: each row of a file is one sample, made by the model's own processor."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duotone.calibrate.data import TokenWindows, draw_windows
from duotone.calibrate.sources import TextSource, json_lines, parse_sources, read_utf8
from duotone.errors import DuotoneError
from duotone.models.processor import load_processor
from duotone.models.tokenizer import load_tokenizer

#: A folder's images, each with its caption in a .txt file of the same name.
_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True, eq=False)
class ImageTextPairs:
    """Images with text as a processor gives them to the model; each sample, a batch of one, by itself.

    sha256: of the rows and of the images' bytes. text_bytes: UTF-8 bytes of the tokens that are predicted.
    """

    samples: tuple[dict[str, Tensor], ...]
    sources: tuple[str, ...]
    sha256: str
    text_bytes: int
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """How many samples."""
        return len(self.samples)

    @property
    def tokens(self) -> Tensor:
        """The tokens of all samples in one row [T, ...]."""
        return torch.cat([sample["input_ids"].flatten() for sample in self.samples])

    @property
    def positions(self) -> int:
        """Tokens in all."""
        return self.tokens.numel()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that the calibration's numbers depend on."""
        return {f"{name} of sample {i}": tensor for i, sample in enumerate(self.samples) for name, tensor in sample.items()}

    def batches(self, least: int = 1, written: int = 0) -> list[dict[str, Tensor]]:  # noqa: ARG002 - as TokenWindows
        """The inputs of forward passes, by name."""
        return [dict(sample) for sample in self.samples]


@dataclass(frozen=True)
class _Row:
    """A row as it is meant: `text` as the answer to images, or `messages`. place: for errors."""

    place: str
    images: tuple[Path, ...]
    text: str | None
    messages: list[dict[str, Any]] | None


def draw_samples(
    folder: Path, sources: Sequence[str], seq_len: int, count: int | None, seed: int, sees: tuple[int, ...] = ()
) -> TokenWindows | ImageTextPairs:
    """Token windows of texts; or, where the sources hold images, samples of images with text.

    sees: the tokens in whose places the model of `folder` puts what it sees; none for a model that only reads. Raises
    DuotoneError as `draw_windows` and `draw_pairs` do, and for images before a model that only reads.
    """
    with_images = [source.name for source in parse_sources(sources) if holds_images(source)]
    if not with_images:
        return draw_windows(load_tokenizer(folder), sources, seq_len, count, seed)
    if not sees:
        raise DuotoneError(f"{with_images[0]}: holds images, found a model in {folder} that only reads text")
    if with_images[0] not in sources:
        raise DuotoneError(f"{with_images[0]}: holds images, found a weight beside it, expected none: weights are for texts")
    if len(with_images) < len(sources):
        raise DuotoneError(f"{with_images[0]}: holds images, others do not, expected either with all of them")
    return draw_pairs(load_processor(folder), sources, seq_len, count, seed, sees)


def draw_pairs(
    processor: Any, sources: Sequence[str], seq_len: int, count: int | None, seed: int, sees: tuple[int, ...]
) -> ImageTextPairs:
    """`count` samples of all rows of the sources, drawn by `seed` and kept in their order; all rows for None.

    A sample longer than seq_len loses the end of its text. Raises DuotoneError for a bad row, an image that cannot be read or
    lies elsewhere, and images that alone take more than seq_len tokens.
    """
    rows = [row for source in sources for row in _rows(source)]
    if not rows:
        raise DuotoneError(f"{sources[0]}: found no image with text, expected some")
    notes: list[str] = []
    if count is not None and count < len(rows):
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].sort().values.tolist()
        rows = [rows[i] for i in chosen]
    elif count is not None and count > len(rows):
        notes.append(f"{Path(sources[0]).name}: holds {len(rows)} images with text, {count} were asked for")
    digest, text_bytes = hashlib.sha256(), 0
    samples: list[dict[str, Tensor]] = []
    for row in rows:
        digest.update(repr((row.text, row.messages)).encode())
        sample = _sample(processor, row, digest)
        samples.append(_cut(sample, seq_len, sees, row.place))
        ids = samples[-1]["input_ids"]
        predicted = ids[:, 1:][predicted_of(ids, sees)].tolist()
        text_bytes += len(processor.tokenizer.decode(predicted, skip_special_tokens=True).encode())
    return ImageTextPairs(tuple(samples), tuple(sources), digest.hexdigest(), text_bytes, tuple(notes))


def predicted_of(ids: Tensor, sees: tuple[int, ...]) -> Tensor:
    """Which of the tokens [1, 1:T] are predicted from an image: those behind the first place of one that are no such place."""
    is_image = torch.isin(ids, torch.tensor(sees, device=ids.device))
    behind = is_image.cumsum(-1) > 0
    return behind[:, :-1] & ~is_image[:, 1:]


def holds_images(source: TextSource) -> bool:
    """Is this a folder, or a .jsonl file whose first row names an image, and no field of it is asked for?"""
    path = Path(source.name)
    try:
        if path.is_dir():
            return True
        if source.fields or path.suffix != ".jsonl" or not path.is_file():
            return False
    except OSError:  # a name that no file system takes
        return False
    first = next(json_lines(path, read_utf8(path)), {})
    return "image" in first or "images" in first


def _rows(source: str) -> Iterator[_Row]:
    path = Path(source)
    if path.is_dir():
        yield from _rows_of_folder(path)
        return
    for number, row in enumerate(json_lines(path, read_utf8(path)), 1):
        place = f"{path}, row {number}"
        named = row.get("image", row.get("images"))
        names = [name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str) and name]
        if not names or (isinstance(named, list) and len(names) < len(named)):
            raise DuotoneError(f"{place}: found image {named!r}, expected the path of an image, or a list of them")
        text, messages = row.get("text"), row.get("messages")
        if not isinstance(text, str) and not (isinstance(messages, list) and messages):
            raise DuotoneError(f"{place}: found the fields {sorted(row)}, expected 'text' or 'messages' beside the image")
        images = tuple(_inside(path.parent, name, place) for name in names)
        yield _Row(place, images, None, messages) if messages else _Row(place, images, text, None)


def _rows_of_folder(folder: Path) -> Iterator[_Row]:
    for image in sorted(folder.iterdir()):
        if image.suffix.lower() in _IMAGES:
            caption = image.with_suffix(".txt")
            if not caption.is_file():
                raise DuotoneError(f"{image}: found no caption beside it, expected {caption.name}")
            yield _Row(str(image), (_inside(folder, image.name, str(image)),), read_utf8(caption).strip(), None)


def _inside(folder: Path, name: str, place: str) -> Path:
    """An image's path, refused if it leads out of the folder, through a link or otherwise."""
    try:
        path = (folder / name).resolve()
        found = path.is_file()
    except (OSError, ValueError) as error:
        raise DuotoneError(f"{place}: the image {name!r} cannot be opened ({error})") from None
    if not path.is_relative_to(folder.resolve()):
        raise DuotoneError(f"{place}: found the image {name!r}, expected one inside {folder}")
    if not found:
        raise DuotoneError(f"{place}: found no image {name!r} in {folder}")
    return path


def _sample(processor: Any, row: _Row, digest: Any) -> dict[str, Tensor]:
    """What the processor makes of a row, a batch of one."""
    prompt = _prompt(processor, row)
    images = [_image(path, row.place, digest) for path in row.images]
    bos = processor.tokenizer.bos_token
    options = {"add_special_tokens": False} if bos is not None and prompt.startswith(bos) else {}  # as transformers' own does
    try:
        made = processor(text=[prompt], images=[images], return_tensors="pt", **options)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DuotoneError(f"{row.place}: the model's processor cannot take it ({reason})") from None
    return {name: tensor for name, tensor in made.items() if isinstance(tensor, Tensor)}


def _prompt(processor: Any, row: _Row) -> str:
    """The text that the processor is called with: the chat template's, or what the row says behind the images."""
    marks = processor.image_token * len(row.images)
    if row.text is not None and processor.image_token in row.text:
        return row.text  # it says itself where the images belong
    messages = _messages(row)
    if processor.chat_template:
        # Nothing is processed yet, but SmolVLM's warns of a missing dictionary that it then fills itself.
        return str(processor.apply_chat_template(messages, tokenize=False, processor_kwargs={"padding": False}))
    parts = [part for message in messages for part in message["content"] if part["type"] == "text"]
    return marks + "\n".join(part["text"] for part in parts)


def _messages(row: _Row) -> list[dict[str, Any]]:
    """The conversation with the places of its images; a text is the answer to them. Nothing is left that could be fetched."""
    shown = [{"type": "image"} for _ in row.images]
    if row.messages is None:
        answer = [{"type": "text", "text": row.text}]
        return [{"role": "user", "content": shown}, {"role": "assistant", "content": answer}]
    messages: list[dict[str, Any]] = []
    for message in copy.deepcopy(row.messages):
        content = message.get("content") if isinstance(message, dict) else None
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not isinstance(message.get("role"), str):
            raise DuotoneError(f"{row.place}: found a message that is {message!r}, expected a role and content")
        messages.append({"role": message["role"], "content": [_part(part, row.place) for part in parts]})
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if places == 0:
        asked = next((message for message in messages if message["role"] == "user"), messages[0])
        asked["content"] = shown + asked["content"]
    elif places != len(row.images):
        raise DuotoneError(f"{row.place}: found {places} places of images in its messages, expected {len(row.images)}")
    return messages


def _part(part: Any, place: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in {"image", "image_url"}:
        return {"type": "image"}
    raise DuotoneError(f"{place}: found content of the type {kind!r}, expected text or image")


def _image(path: Path, place: str, digest: Any) -> Any:
    """An image in RGB, upright."""
    from PIL import Image, ImageOps  # pyright: ignore[reportMissingImports] - an extra

    try:
        digest.update(path.read_bytes())
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DuotoneError(f"{place}: {path.name} cannot be read as an image ({' '.join(str(error).split())[:200]})") from None


def _cut(sample: dict[str, Tensor], seq_len: int, sees: tuple[int, ...], place: str) -> dict[str, Tensor]:
    """A sample of at most seq_len tokens: the end of its text is left out."""
    ids = sample["input_ids"]
    is_image = torch.isin(ids, torch.tensor(sees))
    if not bool(is_image.any()):
        raise DuotoneError(f"{place}: its tokens have no place for the image, expected one; the processor is another model's")
    needed = int(is_image[0].nonzero()[-1]) + 2
    if needed > seq_len:
        raise DuotoneError(f"{place}: its last image ends at token {needed - 1}, expected it before {seq_len} (--seq-len)")
    if not bool(predicted_of(ids, sees).any()):
        raise DuotoneError(f"{place}: found no text behind its image, expected some")
    return {name: tensor[:, :seq_len] if tensor.shape == ids.shape else tensor for name, tensor in sample.items()}
