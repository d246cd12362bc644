"""A classifier of handwritten digits behind a FastAPI app; runs in replicas.

In comes a drawing, as numbers or as a PNG image; out goes the digit that it shows. It
needs scikit-learn, which the training data come with, and pillow: the extra ``demo``.
"""

from __future__ import annotations

import html
import io
import json
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field, ValidationError

from daskserve.deployment import deployment
from daskserve.ingress import ingress

#: A digit from the data that the classifier is not trained with, as `Drawing.pixels`.
EXAMPLE_DIGIT = 3
# fmt: off
EXAMPLE_PIXELS = [
     0,  0,  3, 12, 16, 14,  0,  0,
     0,  3, 15, 16, 15, 14,  0,  0,
     0,  3, 12,  1, 15,  8,  0,  0,
     0,  0,  0,  9, 16,  8,  0,  0,
     0,  0,  0, 10, 16, 16,  8,  0,
     0,  0,  0,  2,  5, 13,  8,  0,
     0,  0,  2, 11, 11, 15,  5,  0,
     0,  0,  3, 16, 16,  9,  0,  0,
]
# fmt: on

SIDE = 8
INK = 16
MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_IMAGE_PIXELS = 4096 * 4096

app = FastAPI(
    title="Handwritten digits",
    description="Tells which digit a drawing of 8 x 8 pixels shows.",
)


class Drawing(BaseModel):
    """A drawing of 8 x 8 pixels, row by row: 0 is paper, 16 is ink."""

    pixels: list[Annotated[float, Field(ge=0, le=INK)]] = Field(
        min_length=SIDE * SIDE, max_length=SIDE * SIDE, examples=[EXAMPLE_PIXELS]
    )


class Prediction(BaseModel):
    """The likeliest digit, and how likely each of 0 to 9 is."""

    digit: int
    probabilities: list[float]


def train() -> tuple[Any, float]:
    """Train a classifier with three quarters of the data.

    Returns
    -------
    model, accuracy
        An estimator of scikit-learn, and the share of the other quarter that it gets
        right.
    """
    from sklearn.datasets import load_digits
    from sklearn.kernel_approximation import Nystroem
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline

    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        x, y, stratify=y, random_state=0
    )
    model = make_pipeline(
        Nystroem(gamma=0.001, n_components=300, random_state=0),
        LogisticRegression(C=100, max_iter=300),
    ).fit(x_train, y_train)
    return model, float(model.score(x_test, y_test))


def from_png(data: bytes) -> list[float]:
    """Convert an image to 8 x 8 pixels from 0, paper, to 16, ink.

    Paper is what the left and right edges are: ink may be dark or light. Where the
    image is transparent there is white paper.

    Parameters
    ----------
    data
        A PNG file of any shape; a square that the digit fills is recognized best.

    Raises
    ------
    ValueError
        It is none, or too large, or has 16 bits per pixel.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise ValueError(f"{width} x {height} pixels are too many")
            if image.mode.startswith("I"):  # pillow would cut off the bright half
                raise ValueError("16 bits per pixel, save it with 8")
            drawing = image.convert("RGBA")
    except ValueError:
        raise
    except Exception as err:  # broken files raise SyntaxError, zlib.error and more
        raise ValueError(str(err)) from err
    paper = Image.new("RGBA", drawing.size, "white")
    paper.alpha_composite(drawing)
    small = paper.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()
    edges = sorted(small[::SIDE] + small[SIDE - 1 :: SIDE])
    dark_ink = edges[SIDE] > 127
    return [(255 - v if dark_ink else v) * INK / 255 for v in small]


def to_png(pixels: list[int], scale: int = 16) -> bytes:
    """Draw 8 x 8 pixels as a PNG image, dark on white, `scale` times as large."""
    from PIL import Image

    grey = bytes(255 - round(p * 255 / INK) for p in pixels)
    size = (SIDE * scale, SIDE * scale)
    image = Image.frombytes("L", (SIDE, SIDE), grey)
    file = io.BytesIO()
    image.resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def curl_line(url: str) -> str:
    """Return a command that sends the example.

    Parameters
    ----------
    url
        That of ``/digits/predict``.
    """
    body = json.dumps({"pixels": EXAMPLE_PIXELS}, separators=(",", ":"))
    return f"curl -s {url} -H 'Content-Type: application/json' -d '{body}'"


async def read_body(request: Request) -> bytes:
    """Read a request's body, but no more of it than `MAX_BODY_BYTES`."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"The limit is {MAX_BODY_BYTES} bytes.")
    return bytes(body)


def read_pixels(
    request: Request, body: Annotated[bytes, Depends(read_body)]
) -> list[float]:
    """Read a drawing of either kind."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "image/png":
        try:
            return from_png(body)
        except ValueError as err:
            raise HTTPException(422, f"This PNG image cannot be used: {err}") from err
    if kind != "application/json":
        raise HTTPException(
            415, f"Content-Type is {kind!r}: send application/json or image/png."
        )
    try:
        return Drawing.model_validate_json(body).pixels
    except ValidationError as err:
        # Without the input: it may hold NaN, which an answer in JSON cannot.
        errors = err.errors(
            include_url=False, include_context=False, include_input=False
        )
        located = [{**error, "loc": ("body", *error["loc"])} for error in errors]
        raise RequestValidationError(located) from err


@deployment(name="digits", route_prefix="/digits", num_replicas=2)
@ingress(app)
class DigitClassifier:
    """Recognize handwritten digits."""

    def __init__(self) -> None:
        self.model, self.accuracy = train()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page(self, request: Request) -> str:
        """Describe the service."""
        root = request.scope.get("root_path", "")
        command = html.escape(curl_line(str(request.url_for("predict"))))
        return _PAGE.format(accuracy=self.accuracy, root=root, command=command)

    @app.get("/example.png", response_class=Response)
    def example(self) -> Response:
        """Return a drawing to try, a 3."""
        return Response(to_png(EXAMPLE_PIXELS), media_type="image/png")

    @app.post(
        "/predict",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": Drawing.model_json_schema()},
                    "image/png": {"schema": {"type": "string", "format": "binary"}},
                },
            }
        },
    )
    def predict(
        self, pixels: Annotated[list[float], Depends(read_pixels)]
    ) -> Prediction:
        """Tell which digit a drawing shows."""
        probabilities = [float(p) for p in self.model.predict_proba([pixels])[0]]
        digit = probabilities.index(max(probabilities))
        return Prediction(digit=digit, probabilities=probabilities)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Handwritten digits</title>
<style>
body {{ max-width: 44em; margin: 2em auto; font-family: sans-serif }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #eee; padding: 1em }}
</style>
<h1>Handwritten digits</h1>
<p>Tells which digit a drawing of 8 x 8 pixels shows. It is right for {accuracy:.1%} of
the drawings that it was not trained with.</p>
<p>Send 64 numbers from 0 (paper) to 16 (ink), row by row, as here, or a PNG image with
<code>Content-Type: image/png</code>. These are the numbers of
<a href="{root}/example.png">this drawing</a>, a 3:</p>
<pre>{command}</pre>
<p><a href="{root}/docs">The API</a></p>
</html>
"""
