"""Hostile images, labels, samples, recipes and plans, given to the commands that read them."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image
from tests.fuzz.cases import DIGITS, HUGE, QUICK, Case, hostile

MODEL = str(DIGITS / "digits_bnfolded.onnx")
DTYPES = ("u1", "i1", "i8", "u8", "f2", "f4", "f8", "c8", "?", "U3", "S3", "M8[s]", "O", "V4", ">f4", "f16", "i8,f4")
SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (0,),
    (3,),
    (2, 16, 16),
    (2, 16, 16, 1),
    (2, 16, 16, 3),
    (2, 16, 16, 4),
    (2, 1, 16, 16),
    (0, 1, 16, 16),
    (2, 0, 16),
    (1,) * 9,
)


def command(random: Random, data: str, *more: str) -> tuple[str, ...]:
    works: list[tuple[str, ...]] = [
        ("evaluate", MODEL, data, *more),
        ("compare", MODEL, MODEL, "--data", data, "--rounds", "1", *more),
    ]
    if not more:
        works.append(("quantize", MODEL, "-o", "out.onnx", "--images", data, *QUICK[2:]))
    return random.choice(works)


def array(random: Random, shape: tuple[int, ...]) -> np.ndarray:
    """Values of any type, some of them beyond all reason."""
    dtype = np.dtype(random.choice(DTYPES))
    if dtype.kind == "O":
        return np.full(shape, {"a": 1}, dtype=object)
    made = np.zeros(shape, dtype)
    if made.size and dtype.kind in "iuf":
        made.flat[0] = random.choice([np.iinfo(dtype).max, np.iinfo(dtype).min] if dtype.kind in "iu" else [np.nan, np.inf, -1.0])
    return made


def npy(random: Random, header: bytes = b"") -> bytes:
    """A .npy member with a header of its own."""
    sizes = random.choice(((2**40,), (2**62, 4), (-1, 4), (10**5, 10**5), (2**20, 2**20, 2**20), (3,), (2, 16, 16)))
    text = (
        header
        or f"{{'descr': '{random.choice(('<f4', '|u1', '<i8', '|O', 'x', '<U999999999'))}', 'fortran_order': False, 'shape': {sizes}, }}".encode()
    )
    text += b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", min(len(text), 65535)) + text + bytes(64)


@hostile("data")
@hostile("data")
def arrays(random: Random, folder: Path) -> Case:
    """An npz of labelled images or of samples, with arrays of any shape and type."""
    samples = random.random() < 0.5
    names = ("images", "labels", "confidence") if samples else ("x", "y")
    given = {}
    for name in names:
        if random.random() < 0.85:
            shape = (
                random.choice(SHAPES)
                if random.random() < 0.5
                else ((2, 1, 16, 16) if name == "images" else (2, 16, 16) if name == "x" else (2,))
            )
            given[name] = (
                array(random, shape)
                if random.random() < 0.6
                else np.zeros(shape, {"x": "u1", "y": "i8", "labels": "i8"}.get(name, "f4"))
            )
    np.savez(folder / "data.npz", **given)
    title = ", ".join(f"{name} {value.dtype}{value.shape}" for name, value in given.items())
    if samples:
        commands = (("dreams", MODEL, "data.npz"), ("compare", MODEL, MODEL, "--samples", "data.npz", "--rounds", "1"))
        return Case(title, random.choice(commands))
    return Case(title, command(random, "data.npz"))


@hostile("data")
def lying_arrays(random: Random, folder: Path) -> Case:
    """An npz whose headers ask for more than there is, or are no headers; a bomb; members of odd names."""
    kind = random.choice(("header", "deep", "bomb", "names", "expression", "many"))
    method = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(folder / "data.npz", "w", method) as archive:
        for name in random.choice((("x", "y"), ("images",), ("images", "labels"))):
            if kind == "bomb":  # six gigabytes of zeros in six megabytes
                side = 1000 if name != "y" else 1
                head = f"{{'descr': '{'<f4' if name == 'images' else '|u1'}', 'fortran_order': False, 'shape': ({6 * 10**9 // side**2}, {side}, {side}), }}\n"
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode())
                    for _ in range(16 if random.random() < 0.8 else 5800):
                        file.write(bytes(2**20))
            elif kind == "deep":
                archive.writestr(f"{name}.npy", npy(random, b"(" * 9000 + b")" * 9000))
            elif kind == "expression":
                archive.writestr(f"{name}.npy", npy(random, b"__import__('os').system('touch payload')"))
            elif kind == "many":
                for number in range(2000):
                    archive.writestr(f"{name}{number}.npy", npy(random))
            else:
                odd = random.choice((f"../{name}.npy", f"/{name}.npy", f"{name}", f"{name}.npy/x", f"x\x00{name}.npy", "x"))
                archive.writestr(odd if kind == "names" else f"{name}.npy", npy(random))
    works = (command(random, "data.npz"), ("dreams", MODEL, "data.npz"), ("compare", MODEL, MODEL, "--samples", "data.npz"))
    return Case(f"npz: {kind}", random.choice(works))


@hostile("data")
def broken_archives(random: Random, folder: Path) -> Case:
    suffix = random.choice((".npz", ".zip", ".safetensors"))
    data = bytearray((DIGITS / "digits_test.npz").read_bytes())
    kind = random.choice(("flipped", "cut", "empty", "text", "size"))
    if kind == "flipped":
        for _ in range(random.choice((1, 20))):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif kind == "cut":
        del data[random.randrange(len(data)) :]
    elif kind == "size":  # what the central directory says of sizes
        place = data.rfind(b"PK\x01\x02")
        data[place + 20 : place + 28] = struct.pack("<II", random.choice((0, 10, 2**32 - 1)), random.choice((0, 2**32 - 1)))
    else:
        data = bytearray(b"" if kind == "empty" else b"text\n" * 50)
    name = f"data{suffix}"
    (folder / name).write_bytes(data)
    works = (("dreams", MODEL, name), command(random, name), ("compare", MODEL, MODEL, "--samples", name))
    return Case(f"{suffix} {kind}", random.choice(works))


@hostile("data")
def tensors(random: Random, folder: Path) -> Case:
    """A safetensors file with a header of its own."""
    header: dict[str, object] = {"images": {"dtype": "F32", "shape": [2, 1, 16, 16], "data_offsets": [0, 2048]}}
    made_by: object = {"method": "noise", "seed": 0, "options": {}}
    kind = random.choice(("shape", "dtype", "offsets", "made_by", "depth", "length", "text", "losses", "name", "nan"))
    entry: dict[str, object] = header["images"]  # type: ignore[assignment]
    if kind == "shape":
        entry["shape"] = random.choice(([], [2**40, 2**40], [0], [-1], [512], [2, 1, 16.5], "x"))
    elif kind == "dtype":
        entry["dtype"] = random.choice(("F16", "I64", "F8_E4M3", "XX", 3))
    elif kind == "offsets":
        entry["data_offsets"] = random.choice(([0, 2**60], [5, 1], [-1, 4], []))
    elif kind == "losses":
        entry["data_offsets"], header["losses"] = [0, 2048], {"dtype": "F32", "shape": [2, 2], "data_offsets": [2048, 2064]}
    elif kind == "name":
        header["\n\x1b[0m"] = header.pop("images")
    made_by = (
        random.choice(("x", "[]", "3", "null", '{"seed": "x"}', '{"seed": 1e400}', '{"options": 3}', "[" * 10**5))
        if kind == "made_by"
        else json.dumps(made_by)
    )
    text = json.dumps(header | {"__metadata__": {"made_by": made_by}}).encode()
    if kind == "depth":
        text = b'{"a":' * 10**5 + b"1" + b"}" * 10**5
    elif kind == "text":
        text = b"\xff" * 100
    length = random.choice((2**63, 2**40, 0, 5)) if kind == "length" else len(text)
    pixels = np.full(512, np.nan if kind == "nan" else 0, np.float32).tobytes()
    (folder / "data.safetensors").write_bytes(struct.pack("<Q", length) + text + pixels + bytes(16 if kind == "losses" else 0))
    works = (("dreams", MODEL, "data.safetensors"), ("compare", MODEL, MODEL, "--samples", "data.safetensors", "--rounds", "1"))
    return Case(f"safetensors: {kind}", random.choice(works))


def png(width: int, height: int, data: bytes, *, depth: int = 1, color: int = 0) -> bytes:
    def part(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", data) + part(b"IEND", b"")


def picture(random: Random) -> tuple[str, bytes]:
    """The name and the bytes of an image that is none, is damaged, or is larger than it looks."""
    kind = random.choice(
        (
            "bomb",
            "declared",
            "warned",
            "cut",
            "flipped",
            "text",
            "deep",
            "palette",
            "animated",
            "thin",
            "valid",
            "tiff",
            "svg",
            "gif",
        )
    )
    made = BytesIO()
    Image.fromarray(np.full((16, 16), 7, np.uint8)).save(made, format=random.choice(("PNG", "BMP", "TIFF", "GIF", "WEBP")))
    data = made.getvalue()
    if kind == "bomb":
        packer = zlib.compressobj(9)
        row = bytes(1 + 30000 // 8)
        data = png(30000, 30000, b"".join([packer.compress(row * 1000) for _ in range(30)]) + packer.flush())
    elif kind == "declared":
        side = random.choice((60000, 2**31 - 1, 0))
        data = png(side, side, zlib.compress(bytes(100)), depth=8, color=random.choice((0, 2, 3, 9)))
    elif kind == "warned":
        data = png(10000, 12000, zlib.compress(bytes(1251 * 12000)))
    elif kind == "cut":
        data = data[: random.randrange(len(data))]
    elif kind == "flipped":
        data = bytearray(data)  # type: ignore[assignment]
        for _ in range(3):
            data[random.randrange(len(data))] ^= 255  # type: ignore[index]
    elif kind in ("text", "svg"):
        data = b"<svg/>" if kind == "svg" else b"no image"
    elif kind == "deep":
        data = png(16, 16, zlib.compress(bytes(16 * 33)), depth=16)
    elif kind == "thin":
        data = png(random.choice((1, 100000)), 1, zlib.compress(bytes(12501)))
    return kind, bytes(data)


@hostile("data")
@hostile("data")
def pictures(random: Random, folder: Path) -> Case:
    """Broken and oversized images, in folders and zip files, with and without labels."""
    kind, data = picture(random)
    suffix = random.choice((".png", ".jpg", ".tif", ".bmp", ".gif", ".webp"))
    place = random.choice(("folder", "zip", "flat"))
    if place == "folder":
        (folder / "data" / "0").mkdir(parents=True)
        (folder / "data" / "0" / f"a{suffix}").write_bytes(data)
        return Case(f"{kind} image", command(random, "data"))
    (folder / "labels.csv").write_text(f"file,label\na{suffix},0\n")
    if place == "zip":
        with zipfile.ZipFile(folder / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"a{suffix}", data)
        return Case(f"{kind} image", command(random, "data.zip", "--labels", "labels.csv"))
    (folder / "data").mkdir()
    (folder / "data" / f"a{suffix}").write_bytes(data)
    return Case(f"{kind} image", command(random, "data", "--labels", "labels.csv"))


@hostile("data")
def zip_bombs(random: Random, folder: Path) -> Case:
    """A zip whose image unpacks to gigabytes, or that lies about its sizes, is locked, or links elsewhere."""
    kind = random.choice(("bomb", "encrypted", "link", "duplicate", "method", "lying"))
    with zipfile.ZipFile(folder / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        if kind == "bomb":
            with archive.open("a.png", "w", force_zip64=True) as file:
                for _ in range(random.choice((700, 5000))):
                    file.write(bytes(2**20))
        elif kind == "link":
            info = zipfile.ZipInfo("a.png")
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc/passwd")
        else:
            archive.writestr("a.png", png(16, 16, zlib.compress(bytes(48))))
    if kind in ("encrypted", "method", "lying"):
        data = bytearray((folder / "data.zip").read_bytes())
        place = data.rfind(b"PK\x01\x02")
        if kind == "encrypted":
            data[place + 8] |= 1
        elif kind == "method":
            data[place + 10] = 99
        else:
            data[place + 24 : place + 28] = struct.pack("<I", random.choice((1, 2**32 - 2)))
        (folder / "data.zip").write_bytes(data)
    (folder / "labels.csv").write_text("file,label\na.png,0\n")
    return Case(f"zip: {kind}", command(random, "data.zip", "--labels", "labels.csv"))


@hostile("data")
@hostile("data")
def labels(random: Random, folder: Path) -> Case:
    """A csv of names that lead elsewhere and of labels that are none."""
    (folder / "data").mkdir()
    (folder / "data" / "a.png").write_bytes(png(16, 16, zlib.compress(bytes(48))))
    name = random.choice(
        (
            "a.png",
            "/etc/passwd",
            "../labels.csv",
            "a\x00b",
            "",
            "a" * 5000,
            ".",
            "/dev/zero",
            "/dev/stdin",
            "\ud800",
            "a.png/",
            "..",
            "data/../a.png",
            str(folder / "data" / "a.png"),
        )
    )
    label = random.choice(("0", "-1", "9", "10", str(10**12), str(2**63), "9" * 5000, "nan", "", "1.0", "٣", "0x1", " 1", "1_0"))
    kind = random.choice(("plain", "plain", "plain", "wide", "quote", "nul", "no newline", "long", "utf-16"))
    text = f'file,label\n"{name}",{label}\n'
    text = {
        "wide": text + ",".join("a" * 9999) + "\n",
        "quote": 'file,label\n"a.png,0\n',
        "nul": text + "\x00,\x00\n",
        "long": f"file,label\n{'a' * 200000},0\n",
    }.get(kind, text)
    encoded = text.encode("utf-16" if kind == "utf-16" else "utf-8", "surrogatepass")
    (folder / "labels.csv").write_bytes(encoded)
    column = random.choice(("label", "label", "label", "", "\x1b[0m", "file"))
    return Case(
        f"csv {kind}: {name[:20]!r} {label[:20]!r}", command(random, "data", "--labels", "labels.csv", "--label-column", column)
    )


@hostile("data")
def odd_folders(random: Random, folder: Path) -> Case:
    """Folders with links in circles, without rights, of odd names, or full of nothing."""
    (folder / "data").mkdir()
    kind = random.choice(("circle", "pipe", "names", "many", "link", "empty", "none"))
    inside = folder / "data" / "0"
    inside.mkdir()
    image = png(16, 16, zlib.compress(bytes(48)))
    if kind == "circle":
        (inside / "again").symlink_to(folder / "data")
        (inside / "self.png").symlink_to(inside / "self.png")
    elif kind == "pipe":
        (inside / "a.png").symlink_to(random.choice(("/dev/zero", "/dev/full", "/dev/stdin")))
    elif kind == "names":
        (inside / "a\nb\x1b[0m.png").write_bytes(b"x")
        Path(str(inside / "\udcff\udcfe.png")).write_bytes(random.choice((b"x", image)))
    elif kind == "many":
        for number in range(2000):
            (inside / f"{number}.png").symlink_to("/nowhere")
    elif kind == "link":
        (inside / "a.png").symlink_to("/etc/passwd")
    data = {"none": "nowhere"}.get(kind, "data")
    return Case(f"folder: {kind}", command(random, data))


def toml(random: Random) -> tuple[str, bytes]:
    kind = random.choice(
        ("deep", "wide", "value", "value", "value", "value", "bytes", "key", "table", "huge number", "date", "inline")
    )
    base = 'summary = "x"\n[synthesis]\nmethod = "noise"\n'
    count, text = (
        random.choice(HUGE),
        random.choice(('"x"', "true", "[]", "{}", "nan", "inf", "-1", "1979-05-27", "[[1]]", '""', "1e400")),
    )
    if kind == "deep":
        depth = random.choice((100, 5000, 10**5))
        return kind, f"{base}x = {'[' * depth}{']' * depth}\n".encode()
    if kind == "inline":
        depth = random.choice((100, 5000, 10**5))
        return kind, f"{base}x = {'{a=' * depth}1{'}' * depth}\n".encode()
    if kind == "table":
        return kind, f"{base}[{'.'.join('a' * random.choice((200, 50000)))}]\nx = 1\n".encode()
    if kind == "wide":
        return kind, (base + "".join(f"k{i} = {i}\n" for i in range(20000))).encode()
    if kind == "bytes":
        return kind, random.choice((b"\xff\xfe", b"\x00" * 10, "summary = '\ud800'".encode("utf-8", "surrogatepass"), b""))
    if kind == "huge number":
        return kind, f"{base}count = {'9' * random.choice((10, 5000, 10**5))}\n".encode()
    if kind == "key":
        name = random.choice(("", "\\u0000", "\\u001b[0m", "a.b"))
        return kind, f'{base}"{name}" = 1\n'.encode()
    field = random.choice(("count", "held_out", "widen", "method", "seed", "steps"))
    value = random.choice((str(count), f"-{count}", text))
    if kind == "date":
        return kind, f"{base}[quantization]\nbits = {value}\nplan = {text}\n".encode()
    base = base.replace('method = "noise"\n', "") if field == "method" else base
    return f"{field} = {value}", f"{base}{field} = {value}\n".encode()


@hostile("data")
@hostile("data")
def recipes(random: Random, folder: Path) -> Case:
    title, data = toml(random)
    (folder / "recipe.toml").write_bytes(data)
    works = (
        ("quantize", MODEL, "-o", "out.onnx", "--recipe", "recipe.toml", "--no-estimate"),
        ("inspect", MODEL, "--recipe", "recipe.toml"),
    )
    return Case(f"recipe: {title}", random.choice(works))


@hostile("data")
def plans(random: Random, folder: Path) -> Case:
    title, data = toml(random)
    text = data.decode("utf-8", "surrogateescape").replace('[synthesis]\nmethod = "noise"\n', "")
    fields = (
        "deviations",
        "transforms",
        "weight_options",
        "layers",
        "first_weight_bits",
        "effect_limit",
        "activation_options",
        "placement",
        "name",
    )
    value = random.choice(
        (
            str(random.choice(HUGE)),
            "nan",
            "inf",
            "[]",
            '["x"]',
            "{x = 1}",
            '"x"',
            "-1",
            '["fold_batchnorm", "fold_batchnorm"]',
            "{conv2d = {weight_bits = 1e9}}",
        )
    )
    if random.random() < 0.5:
        text, title = f'summary = "x"\n{random.choice(fields)} = {value}\n', value
    (folder / "plan.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    works = (
        ("quantize", MODEL, "-o", "out.onnx", "--plan", "plan.toml", *QUICK),
        ("inspect", MODEL, "--plan", "plan.toml"),
        ("dreams", MODEL, str(DIGITS / "digits_test.npz"), "--plan", "plan.toml"),
    )
    return Case(f"plan: {title}", random.choice(works))


@hostile("data")
def broken_labels(random: Random, folder: Path) -> Case:
    """Labels of other forms than classes: boxes in COCO's form, masks, lists in a csv; each with something amiss."""
    (folder / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", (16, 16)).save(folder / "images" / name)
    kind, odd = (
        random.choice(("boxes", "masks", "lists")),
        random.choice((-1, 2**70, 1e308, None, "1", [], {}, float("nan"), True)),
    )
    if kind == "boxes":
        told: dict[str, list[dict[str, object]]] = {
            "images": [{"id": 1, "file_name": "a.png", "width": 16, "height": 16}],
            "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}],
            "categories": [{"id": 1}],
        }
        entry = random.choice(random.choice(list(told.values())))
        entry[random.choice(list(entry))] = odd
        (folder / "labels.json").write_text(random.choice((json.dumps(told), json.dumps(told)[:-9], "[" * 10**5)))
    elif kind == "masks":
        (folder / "labels.masks").mkdir()
        mode = random.choice(("L", "P", "RGB", "I;16", "1", "LA"))
        Image.new(mode, (random.choice((1, 16, 2000)), 16)).save(folder / "labels.masks" / "a.png")
        (folder / "labels.masks" / "b.png").write_bytes(b"text" if random.random() < 0.5 else b"")
    else:
        (folder / "labels.csv").write_text(f"file,label\na.png,{odd} 3\nb.png,1 2 3\n")
    place = {"boxes": "labels.json", "masks": "labels.masks", "lists": "labels.csv"}[kind]
    return Case(f"{kind} with {odd}", command(random, "images", "--labels", place))
