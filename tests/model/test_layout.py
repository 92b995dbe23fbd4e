"""Parts of tensors: which values they show, where they lie in each other, and how tensors are made of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shardq.errors import CheckpointError, UnsupportedModelError
from shardq.formats.source import open_source
from shardq.model.experts import FusedView
from shardq.model.layout import Part, Piece, cut, moved, part_of, put_together, tensor_in, whole, with_views

FUSED = torch.arange(3 * 8 * 5).reshape(3, 8, 5)  # experts, gate and up, inputs
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "an expert": lambda fused: fused[1],
    "an expert's second half": lambda fused: fused[2].chunk(2)[1],
    "every second row": lambda fused: fused[1][1::2],
    "transposed": lambda fused: fused[1].t(),
    "a column": lambda fused: fused[:, :, 3],
    "all": lambda fused: fused,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_part_shows_what_the_view_shows(view: Callable[[Tensor], Tensor]):
    part = part_of(view(FUSED))
    assert torch.equal(part.of(FUSED), view(FUSED))
    assert part_of(view(torch.empty(FUSED.shape, device="meta"))) == part
    places = view(FUSED).flatten()
    assert (part.offset, part.end, part.num_values) == (places[0], places.max() + 1, len(places))
    inner = part_of(torch.empty(view(FUSED).shape)[..., :2])
    assert torch.equal(moved(inner, part).of(FUSED), view(FUSED)[..., :2])


class TestCut:
    """A fused tensor whose experts' gates and ups are stored each by itself, or in other forms."""

    APART = {
        part_of(FUSED[number, 4 * half : 4 * half + 4]): (number, half) for number in range(3) for half in range(2)
    }
    PIECES = {
        place: Piece(f"{number}.{half}", whole((4, 5)), place) for place, (number, half) in APART.items()
    }  # fmt: skip

    def test_what_is_stored_by_itself_is_found(self):
        (piece,) = cut(part_of(FUSED[2].chunk(2)[1]), self.PIECES)
        assert piece == Piece("2.1", whole((4, 5)), whole((4, 5)))

    def test_part_of_a_piece(self):
        (piece,) = cut(part_of(FUSED[2, 5:7].t()), self.PIECES)
        assert (piece.source, piece.in_model) == ("2.1", whole((5, 2)))
        assert torch.equal(piece.in_source.of(FUSED[2, 4:].clone()), FUSED[2, 5:7].t())

    def test_several_pieces(self):
        pieces = cut(part_of(FUSED[1].t()), self.PIECES)
        assert [piece.source for piece in pieces] == ["1.0", "1.1"]
        made = put_together((5, 8), [(p.in_model, FUSED[1].chunk(2)[n]) for n, p in enumerate(pieces)])
        assert torch.equal(made, FUSED[1].t())

    def test_piece_that_is_stored_transposed(self):
        stored = FUSED.transpose(1, 2).contiguous()
        pieces = {whole(FUSED.shape): Piece("t", part_of(stored.transpose(1, 2)), whole(FUSED.shape))}
        (piece,) = cut(part_of(FUSED[1][0::2]), pieces)
        assert torch.equal(piece.in_source.of(stored), FUSED[1][0::2])

    @pytest.mark.parametrize("crossing", [FUSED[0, 2:6], FUSED.flatten()[3:9]], ids=["rows", "no rows"])
    def test_what_crosses_pieces_is_none(self, crossing: Tensor):
        assert cut(part_of(crossing), self.PIECES) == ()

    def test_what_is_not_all_there_is_none(self):
        place = part_of(FUSED[1, :4])
        assert cut(part_of(FUSED[1]), {place: self.PIECES[place]}) == ()


class TestTensors:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "config.json").write_text("{}")
        tensors = {"fused": FUSED.float(), "half": FUSED[0].half(), "rows": FUSED[0].float()}
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    @pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
    def test_view_is_read_without_the_rest(self, folder: Path, view: Callable[[Tensor], Tensor]):
        source, expected = open_source(folder), view(FUSED).float()
        whole_of = (Piece("fused", whole(FUSED.shape), whole(FUSED.shape)),)
        views = {"part": FusedView(fused="fused", shape=tuple(FUSED.shape), of=view)}
        layout = with_views({"fused": whole_of}, views)
        tensor = tensor_in(source.tensors, "part", tuple(expected.shape), layout["part"])
        read = source.read(tensor)
        assert torch.equal(read, expected) and read.untyped_storage().nbytes() == expected.nbytes
        assert torch.equal(source.read_rows(tensor, [0, 2]), expected[[0, 2]])
        span = view(FUSED).max() + 1 - view(FUSED).min()
        assert sum(info.num_bytes for info in tensor.stored) == 4 * span and layout.keys() == {"part"}

    def test_changed_bytes_of_a_part_are_seen_and_others_are_not(self, folder: Path):
        source = open_source(folder)
        parts = [part_of(FUSED[number]) for number in range(3)]
        tensors = [tensor_in(source.tensors, "e", (8, 5), (Piece("fused", part, whole((8, 5))),)) for part in parts]
        for tensor in tensors:
            source.read(tensor)
        info = source.index["fused"]
        with open(info.file, "r+b") as file:
            file.seek(info.offset + 4 * 45)
            file.write(b"\1")
        assert torch.equal(source.read(tensors[0]), FUSED[0].float())
        with pytest.raises(CheckpointError, match=r"tensor fused\[40:80\] is not what it was"):
            source.read(tensors[1])

    def test_several_dtypes_in_one_are_refused(self, folder: Path):
        source, rows = open_source(folder), whole((8, 5))
        pieces = [Piece(name, rows, Part((8, 5), (5, 1), 40 * number)) for number, name in enumerate(("half", "rows"))]
        with pytest.raises(UnsupportedModelError, match="joined is stored in parts of several dtypes"):
            tensor_in(source.tensors, "joined", (16, 5), tuple(pieces))
