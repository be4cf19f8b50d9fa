import base64

import pytest

from attire.errors import AttireError
from attire.server import uploads
from attire.server.problems import Problem


def test_a_batch_is_decoded_in_its_order() -> None:
    texts = [base64.b64encode(data).decode() for data in (b"a", b"bc")]
    found = uploads.parse_batch(f'{{"images": ["{texts[0]}", "a b", "{texts[1]}"]}}'.encode(), 3)
    assert (found[0], found[2]) == (b"a", b"bc")
    assert isinstance(found[1], Problem)


@pytest.mark.parametrize("text", ["aGk", "aGk=\n", "aGk*", "ä", "data:image/png;base64,aGk=", "-_-_"])
def test_only_plain_base64_is_taken(text: str) -> None:
    assert isinstance(uploads._decode_base64(text), Problem)


def test_uploads_beyond_the_budget_are_refused_and_not_counted() -> None:
    budget = uploads.UploadBudget(10)
    budget.reserve(6)
    with pytest.raises(Problem, match="too many uploads"):
        budget.reserve(5)
    budget.reserve(4)
    assert budget.used == 10


def test_what_a_decoder_said_stays_inside() -> None:
    found = uploads.not_a_picture(AttireError("x", "damaged", "<_io.BytesIO object at 0x7f>", "get the file again"))
    assert (found.status, found.detail) == (422, "damaged; get the file again")
