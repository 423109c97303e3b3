"""What find_clips finds, in which order, and in which words it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from vsparse.training.data.clips import Problem, find_clips


def _fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def _pairs(source: Path) -> list[tuple[str, str]]:
    return [(clip.name, clip.caption) for clip in find_clips(source).clips]


def test_captions_beside_videos_at_any_depth_sorted_by_name(tmp_path: Path) -> None:
    files = {"b.mp4": "", "b.txt": " two\n", "a/z.MOV": "", "a/z.txt": "one", "a.webm": "", "a.txt": "\ufeffthree"}
    files |= {"no.mp4": "", "blank.mp4": "", "blank.txt": " \n", "lost.txt": "?", "notes.md": "", "._b.mp4": ""}
    found = find_clips(_fill(tmp_path, files))
    assert [(clip.name, clip.caption) for clip in found.clips] == [
        ("a.webm", "three"),
        ("a/z.MOV", "one"),
        ("b.mp4", "two"),
    ]
    assert [clip.path for clip in found.clips] == [tmp_path / clip.name for clip in found.clips]
    assert found.problems == (
        Problem(name="blank.mp4", reason="no caption: blank.txt is blank"),
        Problem(name="no.mp4", reason="no caption: there is no no.txt"),
        Problem(name="lost.txt", reason="a caption without a video of the same name"),
    )


@pytest.mark.parametrize("video", ["file_name", "video"])
@pytest.mark.parametrize("caption", ["text", "caption"])
def test_tables_keep_the_order_of_their_rows(tmp_path: Path, video: str, caption: str) -> None:
    _fill(tmp_path, {"in/b.mp4": "", "a.mp4": "", "c.mp4": ""})
    rows = [("in/b.mp4", 'a "b", c'), ("./a.mp4", "line\u2028break")]
    csv = "".join('"{}","{}"\n'.format(name, text.replace('"', '""')) for name, text in rows)
    (tmp_path / "x.csv").write_text(f"\ufeff{video},{caption}\n{csv}", encoding="utf-8")
    lines = [
        f'{{"{caption}": "{text}", "{video}": "{name}"}}\n' for name, text in [("in/b.mp4", "B"), ("a.mp4", "x\u2028y")]
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert _pairs(tmp_path / "x.csv") == [("in/b.mp4", 'a "b", c'), ("a.mp4", "line\u2028break")]
    assert _pairs(tmp_path / "x.jsonl") == [("in/b.mp4", "B"), ("a.mp4", "x\u2028y")]


def test_the_table_of_a_folder_answers_for_every_video_in_it(tmp_path: Path) -> None:
    table = "file_name,text\na.mp4,A\ngone.mp4,G\nb.mp4,\n"
    found = find_clips(_fill(tmp_path, {"metadata.csv": table, "a.mp4": "", "b.mp4": "", "c.mp4": "", "c.txt": "C"}))
    assert [clip.name for clip in found.clips] == ["a.mp4"]
    assert found.problems == (
        Problem(name="gone.mp4", reason="no such file"),
        Problem(name="b.mp4", reason="no caption: the cell is blank"),
        Problem(name="c.mp4", reason="no caption: no row of metadata.csv names it"),
    )


def test_a_table_elsewhere_names_what_it_wants(tmp_path: Path) -> None:
    absolute = tmp_path / "far" / "a.mp4"
    _fill(tmp_path, {"far/a.mp4": "", "near/b.mp4": ""})
    _fill(tmp_path, {"near/x.csv": f"video,caption\n{absolute},A\n../near/b.mp4,B\n"})
    clips = find_clips(tmp_path / "near" / "x.csv").clips
    assert [clip.path.resolve() for clip in clips] == [absolute, tmp_path / "near" / "b.mp4"]


@pytest.mark.parametrize(
    ("files", "source", "words"),
    [
        ({}, "", r"no clip with a caption in .*\(nothing there\)"),
        ({}, "none", "does not exist"),
        ({"a.mp4": ""}, "a.mp4", "no folder and no .csv or .jsonl file"),
        ({"a.txt": "x"}, "", r"a.txt: a caption without a video"),
        ({"a.mp4": ""}, "", r"a.mp4: no caption: there is no a.txt"),
        ({"metadata.csv": "", "metadata.jsonl": ""}, "", "both metadata.csv and metadata.jsonl"),
        ({"x.csv": ""}, "x.csv", "0 columns named file_name or video"),
        ({"x.csv": "video,caption\n"}, "x.csv", "nothing there"),
        ({"x.csv": "video,caption,fps\na,b,c\n"}, "x.csv", r"unknown columns \['fps'\]; accepted: file_name or video"),
        ({"x.csv": "video\na.mp4\n"}, "x.csv", "0 columns named text or caption"),
        ({"x.csv": "video,file_name,text\na,b,c\n"}, "x.csv", "2 columns named file_name or video"),
        ({"x.csv": "video,text\na.mp4,a,b\n"}, "x.csv", r"line 2: 3 cells for the 2 columns"),
        ({"x.csv": "video,text\na.mp4\n"}, "x.csv", r"line 2: 1 cells"),
        ({"x.csv": 'video,text\na.mp4,"open\n'}, "x.csv", "not CSV"),
        ({"x.csv": "video,text\n ,open\n"}, "x.csv", "video is blank"),
        ({"x.csv": "video,text\na.mp4,x\n./a.mp4,x\n"}, "x.csv", r"line 3: 'a.mp4' stands in x.csv, line 2 already"),
        ({"x.jsonl": "{}"}, "x.jsonl", "line 1: 0 columns"),
        ({"x.jsonl": "\n\n{"}, "x.jsonl", "line 3: not JSON"),
        ({"x.jsonl": '["video", "text"]'}, "x.jsonl", "a row is an object"),
        ({"x.jsonl": '{"video": "a", "text": 3}'}, "x.jsonl", "text must be text, got 3"),
        ({"x.jsonl": '{"video": "a", "text": "b", "text": "c"}'}, "x.jsonl", "2 columns named text or caption"),
    ],
)
def test_refuses_in_words(tmp_path: Path, files: dict[str, str], source: str, words: str) -> None:
    _fill(tmp_path, files)
    with pytest.raises(ValueError, match=words):
        find_clips(tmp_path / source)


def test_another_encoding_is_refused_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text: .* at byte 3"):
        find_clips(tmp_path)
