"""The demo's deployments, each in this process as a replica runs it."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from starlette.testclient import TestClient

from daskserve.demo.app import DEPLOYMENTS
from daskserve.demo.digits import (
    EXAMPLE_DIGIT,
    EXAMPLE_PIXELS,
    MAX_BODY_BYTES,
    DigitClassifier,
    from_png,
    to_png,
)
from daskserve.ingress import find_ingress

PNG = {"content-type": "image/png"}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    cls: Any = DigitClassifier.func_or_class
    ingress = find_ingress(cls)
    assert ingress is not None
    with TestClient(ingress.build(cls()), root_path="/digits") as client:
        yield client


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_the_example_is_not_trained_with() -> None:
    x, y = load_digits(return_X_y=True)
    _, held_out, _, labels = train_test_split(x, y, stratify=y, random_state=0)
    same = [
        label
        for row, label in zip(held_out, labels, strict=True)
        if list(row) == EXAMPLE_PIXELS
    ]
    assert same == [EXAMPLE_DIGIT]


def test_predict_numbers(client: TestClient) -> None:
    response = client.post("/digits/predict", json={"pixels": EXAMPLE_PIXELS})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["digit"] == EXAMPLE_DIGIT
    assert len(answer["probabilities"]) == 10
    assert sum(answer["probabilities"]) == pytest.approx(1)
    assert answer["probabilities"][EXAMPLE_DIGIT] > 0.9


def test_predict_is_right_for_most_of_what_it_was_not_trained_with(
    client: TestClient,
) -> None:
    x, y = load_digits(return_X_y=True)
    _, held_out, _, labels = train_test_split(x, y, stratify=y, random_state=0)
    right = 0
    for row, label in zip(held_out[:50], labels[:50], strict=True):
        response = client.post("/digits/predict", json={"pixels": list(row)})
        right += response.json()["digit"] == label
    assert right >= 47


def test_predict_the_example_image(client: TestClient) -> None:
    image = client.get("/digits/example.png")
    assert image.headers["content-type"] == "image/png"
    response = client.post("/digits/predict", content=image.content, headers=PNG)
    assert response.json()["digit"] == EXAMPLE_DIGIT


def test_images_have_the_pixels_they_were_made_of() -> None:
    for row in load_digits().data[:300]:
        pixels = [int(value) for value in row]
        assert from_png(to_png(pixels, scale=2)) == pytest.approx(pixels, abs=0.05)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("light_ink", [False, True])
def test_image_modes_and_both_colours_of_ink(mode: str, light_ink: bool) -> None:
    black_or_white = [16 * (value > 8) for value in EXAMPLE_PIXELS]
    image = Image.open(io.BytesIO(to_png(black_or_white)))
    if light_ink:
        image = ImageOps.invert(image)
    assert from_png(png(image.convert(mode))) == pytest.approx(black_or_white)


def test_transparent_is_paper() -> None:
    ink = Image.open(io.BytesIO(to_png(EXAMPLE_PIXELS)))
    image = Image.new("RGBA", ink.size, "black")
    image.putalpha(ImageOps.invert(ink))
    assert from_png(png(image)) == pytest.approx(EXAMPLE_PIXELS, abs=0.15)


def numbers(values: list[str]) -> str:
    return f'{{"pixels": [{",".join(values)}]}}'


def bomb() -> bytes:
    """Return a small PNG file that says that it has 30,000 x 30,000 pixels."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    chunks = [
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "cannot identify"),
        (b"this is no image", "cannot identify"),
        (to_png(EXAMPLE_PIXELS)[:60], "truncated"),
        (bomb(), "limit|too many"),
        (png(Image.new("I;16", (8, 8))), "16 bits"),
    ],
    ids=["empty", "text", "cut", "bomb", "16 bits"],
)
def test_images_that_cannot_be_used(client: TestClient, body: bytes, text: str) -> None:
    response = client.post("/digits/predict", content=body, headers=PNG)
    assert response.status_code == 422, response.text
    detail = response.json()["detail"]
    assert detail.startswith("This PNG image cannot be used: ")
    assert any(part in detail for part in text.split("|")), detail


@pytest.mark.parametrize(
    ("body", "location"),
    [
        ("", []),
        ("{", []),
        ("[]", []),
        ("{}", ["pixels"]),
        ('{"pixels": [1, 2, 3]}', ["pixels"]),
        (numbers(["1"] * 65), ["pixels"]),
        (numbers(["1"] * 63 + ["17"]), ["pixels", 63]),
        (numbers(["-1"] + ["1"] * 63), ["pixels", 0]),
        (numbers(["NaN"] + ["1"] * 63), ["pixels", 0]),
        (numbers(["[]"] + ["1"] * 63), ["pixels", 0]),
    ],
)
def test_json_that_is_not_a_drawing(
    client: TestClient, body: str, location: list[str | int]
) -> None:
    response = client.post("/digits/predict", content=body, headers=JSON)
    assert response.status_code == 422, response.text
    assert [e["loc"] for e in response.json()["detail"]] == [["body", *location]]


def test_other_bodies(client: TestClient) -> None:
    response = client.post("/digits/predict", content=b"GIF89a")
    assert response.status_code == 415
    response = client.post("/digits/predict", data={"pixels": "1"})
    assert response.status_code == 415
    assert "application/x-www-form-urlencoded" in response.json()["detail"]
    body = b" " * (MAX_BODY_BYTES + 1)
    assert client.post("/digits/predict", content=body, headers=JSON).status_code == 413
    assert client.get("/digits/predict").status_code == 405


def test_page_and_api_description(client: TestClient) -> None:
    page = client.get("/digits/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "98." in page.text
    assert "curl -s http://testserver/digits/predict" in page.text
    for link in ("/digits/example.png", "/digits/docs"):
        assert f'href="{link}"' in page.text
        assert client.get(link).status_code == 200
    operation = client.get("/digits/openapi.json").json()["paths"]["/predict"]["post"]
    assert set(operation["requestBody"]["content"]) == {"application/json", "image/png"}


def test_deployments_do_not_share_a_route() -> None:
    prefixes = [deployment.route_prefix for deployment in DEPLOYMENTS]
    assert len(set(prefixes)) == len(prefixes) == 6
    assert all(d.func_or_class.__doc__ for d in DEPLOYMENTS)
