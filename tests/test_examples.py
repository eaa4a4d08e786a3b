"""The examples run, and what they claim holds; the README's lines run too."""

import os
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import contextual_embeddings
import language_model
import memory_span
import models
import program
import pytest
import text
import torch
import training
import vocabulary
from matplotlib import pyplot as plt
from rich.console import Console

import pykernels.nn

ROOT = Path(__file__).parents[1]


def run(name, *arguments):
    """What an example prints without a terminal, in plain lines, beside the picture it saves."""
    picture = ROOT / "examples" / "output" / f"{name}.png"
    picture.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", "--quick", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout
    assert picture.stat().st_size > 10_000
    return done.stdout


@pytest.fixture
def output(tmp_path, monkeypatch):
    """For programs in this process: a folder of the test's own, a part of the text, no table."""
    learned, judged = text.paragraphs()
    monkeypatch.setattr(text, "paragraphs", lambda: (learned[:300], judged[:30]))
    monkeypatch.setattr(program, "OUTPUT", tmp_path)
    monkeypatch.setattr(language_model, "benchmark", lambda *_: 0)
    return tmp_path


def test_language_model_quick():
    """All models, both kinds of layers, one curve."""
    printed = run("language_model", "--models", *models.KINDS)
    for kind in models.KINDS:
        assert f"{kind}: step 20/20, loss stock" in printed
    apart = re.findall(r"Largest difference of the two curves: (\S+),", printed)
    assert len(apart) == 4
    assert all(float(difference) < 1e-4 for difference in apart)
    assert len(re.findall(r"^(?:stock|ours) writes: The", printed, re.MULTILINE)) == 8
    assert "times as fast as torch" in printed, "the benchmark"
    assert "/ ours" in printed, "and its table, however narrow"
    for column in ("perplexity", "tokens/s"):
        assert column in printed


def test_a_sweep_resumed_has_its_own_tokens(monkeypatch, capsys, output):
    """Those of these kinds differ from one training to the next."""
    sweep = ["--quick", "--sweep", "--tokenizer", "unigram"]
    monkeypatch.setattr(vocabulary, "step_cost", lambda *_: (1.0, 1.0))
    assert language_model.main(sweep) == 0
    monkeypatch.setattr(text, "train_tokenizer", None)
    tables = [capsys.readouterr().out]
    assert language_model.main([*sweep, "--resume"]) == 0
    tables.append(capsys.readouterr().out)
    first, second = (out[out.index("bits") :] for out in tables)
    assert first == second


def test_vocabulary_sweep_quick(capsys, output):
    assert language_model.main(["--quick", "--sweep"]) == 0
    printed = capsys.readouterr().out
    assert [len(re.findall(rf"^│ +{V} │", printed, re.MULTILINE)) for V in ("500", "2,000")] == [
        1,
        1,
    ]
    for said in ("V = 500: training a tokenizer", "V = 500: timing steps"):
        assert said in printed, "no long work goes unsaid"
    assert (output / "vocabulary.png").stat().st_size > 10_000


def test_docstrings_of_a_library(tmp_path, monkeypatch):
    """Each paragraph once, of files that parse; an escape that is none warns nobody."""
    files = {
        "a.py": '"""One.\n\nTwo."""\ndef f():\n    """One."""\n    return "\\d"\n',
        "b.py": '"""Three."""\nclass\n',
        "test/c.py": '"""Four."""\n',
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(vocabulary.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vocabulary.docstrings.__wrapped__() == ["One.", "Two."]


def test_ticks_are_the_values():
    figure, axis = plt.subplots()
    axis.plot([1, 256, 1000], [0, 1, 2])
    program.logarithmic(axis, [1, 256, 1000])
    figure.canvas.draw()
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "256", "1,000"]
    assert not axis.get_xticks(minor=True).size
    plt.close(figure)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells the peak")
def test_peak_memory_sees_what_was_freed_before():
    for _ in range(2):
        with program.peak_memory("cpu") as peak:
            small = [torch.ones(4096) for _ in range(4000)]  # 64 MB that an allocator may keep
            del small
            assert 50e6 < peak() < 100e6


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["rnn", "transformer"])
def test_words_added_later(kind, tied, output):
    """Old tokens keep their scores when rows are added and when these are trained; text is kept."""
    learned, judged = text.paragraphs()
    tokenizer = text.train_tokenizer("bpe", 300, learned)
    torch.manual_seed(0)
    model = models.LanguageModel("ours", kind, 300, 16, tied=tied)
    tokens = torch.randint(4, 300, (2, 12))
    logits = model.logits(tokens).detach()
    grown, first = vocabulary.add_words(tokenizer, learned, 20)
    assert grown.get_vocab_size() == 320
    for paragraph in judged:
        assert grown.decode(grown.encode(paragraph).ids) == paragraph
    vocabulary.grow(model, first)
    assert (model.head.weight is model.embed.weight) == tied
    after = model.logits(tokens).detach()
    torch.testing.assert_close(after[..., :300], logits)
    assert torch.equal(after.argmax(-1), logits.argmax(-1)), "the likeliest token is the old one"
    vocabulary.train_new_rows_alone(model, 300)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    corpus, run = text.Corpus(grown, 32), training.Run.of(model)
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        run.step(*corpus.batch(8, draw), rate=1e-2)
    for name, p in model.named_parameters():
        grows = name in ("embed.weight", "head.weight", "head.bias")
        assert torch.equal(p[:300] if grows else p, old[name][:300] if grows else old[name]), name
        assert not grows or (p[300:] != old[name][300:]).any(), name
    torch.testing.assert_close(model.logits(tokens)[..., :300], logits)


def test_memory_span_quick(capsys, output):
    """Twice the same numbers."""
    assert memory_span.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "transformer: step 10/10" in printed
    assert "W_hh times 2.0" in printed
    assert "before clipping" in printed
    assert (output / "memory_span.png").stat().st_size > 10_000
    assert memory_span.main(["--quick"]) == 0
    assert capsys.readouterr().out == printed


def test_explodes_unless_clipped():
    """What the last pictures of memory_span.py show, at a part of its steps."""
    sizes = replace(memory_span.FULL, batch=16, steps=60)
    questions = memory_span.Questions(sizes.learned, "cpu")
    runs = memory_span.clipping(questions, sizes, 0, Console(quiet=True))
    worst = {name: max(run.losses[20:]) for name, run in runs.items()}
    assert worst["clipped"] < runs["clipped"].losses[0] < worst["not clipped"]


def test_contextual_embeddings_quick(monkeypatch, capsys, output):
    """Runs where MiniLM is not installed; the same seed gives the same numbers."""
    monkeypatch.setattr(contextual_embeddings, "minilm", lambda: None)
    assert contextual_embeddings.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "MiniLM is left out" in printed
    assert len(re.findall(r"\d within a sense", printed)) == 2, "two models of ours"
    assert (output / "contextual_embeddings.png").stat().st_size > 10_000
    assert contextual_embeddings.main(["--quick"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.skipif(contextual_embeddings.minilm() is None, reason="MiniLM is not installed")
@pytest.mark.parametrize("word", contextual_embeddings.SENTENCES)
def test_minilm_tells_senses_apart(word):
    """On our attention as on torch's own: the nearest sentence is of the same sense."""
    folder = contextual_embeddings.minilm()
    ours = contextual_embeddings.look_minilm(folder, word, "cpu")
    stock = contextual_embeddings.look_minilm(folder, word, "cpu", attention="sdpa")
    torch.testing.assert_close(ours.vectors, stock.vectors, rtol=1e-4, atol=1e-5)
    _, sense = contextual_embeddings.senses(word)
    within, between, right = contextual_embeddings.within_and_between(ours.similarity, sense)
    assert within > between + 0.1
    assert right == len(sense)


@pytest.mark.parametrize("program_", [contextual_embeddings, language_model, memory_span])
def test_ends_on_interrupt(program_, monkeypatch, capsys, output):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    assert program_.main(["--quick"]) == 130
    assert capsys.readouterr().out.endswith("Interrupted.\n")


def test_resumed_as_if_uninterrupted(monkeypatch, capsys, output):
    """Ctrl-C keeps whole steps; --resume makes of them what an uninterrupted run does, bitwise."""
    arguments = ["--quick", "--models", "lstm", "--tied"]
    path = output / "language_model-lstm-quick.pt"
    assert language_model.main(arguments) == 0
    whole = training.load(path)
    step = training.Run.step

    def pressed(run, *rest):
        step(run, *rest)
        if len(run.losses) == 7 and isinstance(run.model.body, pykernels.nn.LSTM):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "step", pressed)
        assert language_model.main(arguments) == 130
    assert "7 steps are kept" in capsys.readouterr().out
    assert training.load(path)["step"] == 7
    assert language_model.main([*arguments, "--resume"]) == 0
    resumed = training.load(path)
    for layers in models.LAYERS:
        one, other = whole["runs"][layers], resumed["runs"][layers]
        assert one["seen"][0] == other["seen"][0], "the losses"
        for name, value in one["model"].items():
            assert torch.equal(value, other["model"][name]), name
    for option, saved, asked in (
        ("seed", 0, 1), ("tokenizer", "bpe", "word"), ("vocabulary", 2000, 500),
    ):  # fmt: skip
        words = rf"is of other options \({option}: saved {saved}, asked {asked}\)"
        with pytest.raises(SystemExit, match=words):
            language_model.main([*arguments, "--resume", f"--{option}", str(asked)])
    assert training.load(path)["step"] == 20, "it is as it was"
    capsys.readouterr()
    assert language_model.main([*arguments, "--prompt", "The object"]) == 0
    assert capsys.readouterr().out.startswith("lstm writes: The object")
    assert language_model.main([*arguments, "--extend", "20"]) == 0
    printed = capsys.readouterr().out
    assert "20 words added" in printed
    assert float(re.search(r"old tokens moved by (\S+)", printed)[1]) < 1e-5
    resumed["runs"]["ours"]["model"]["head.bias"] += 1
    torch.save(resumed, path)
    with pytest.raises(SystemExit, match=r"extended-quick.pt is of other options \(base: saved"):
        language_model.main([*arguments, "--extend", "20", "--resume"])


#: By program: the checkpoint that it reads first, and what makes it do so.
FIRST = {
    contextual_embeddings: ("contextual_embeddings-rnn", []),
    language_model: ("language_model-rnn", []),
    memory_span: ("memory_span-rnn", []),
    vocabulary: ("vocabulary-500", ["--sweep"]),
}


def begin(program_, *arguments):
    main = getattr(program_, "main", language_model.main)
    return main(["--quick", *FIRST[program_][1], *arguments])


@pytest.mark.parametrize("program_", FIRST)
def test_checkpoint_of_other_options_is_kept(program_, output):
    """--resume ends in one line that names them, and touches nothing."""
    path = output / f"{FIRST[program_][0]}-quick.pt"
    draw = torch.Generator()
    training.save(path, {}, draw, 20, {"settings": {"seed": 0, "gone": 1}})
    before = path.read_bytes()
    with pytest.raises(SystemExit) as ended:
        begin(program_, "--resume", "--seed", "3")
    assert "seed: saved 0, asked 3" in ended.value.code
    assert "gone: saved 1, asked nothing" in ended.value.code
    assert "\n" not in ended.value.code
    assert path.read_bytes() == before


@pytest.mark.parametrize("program_", FIRST)
def test_checkpoint_stays_until_it_is_replaced(program_, monkeypatch, output):
    """Without --resume it is not read, and it is there when training ends before its first save."""

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    path = output / f"{FIRST[program_][0]}-quick.pt"
    path.write_bytes(b"of before")
    monkeypatch.setattr(training.Run, "step", interrupted)
    monkeypatch.setattr(vocabulary, "step_cost", lambda *_: (1.0, 1.0))
    assert begin(program_) == 130
    assert path.read_bytes() == b"of before"


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other"])
def test_damaged_checkpoint_is_said_in_one_line(damage, output):
    path = output / "language_model-rnn-quick.pt"
    training.save(path, {}, torch.Generator(), 20, {"settings": {}})
    if damage == "other":
        torch.save([1], path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"text"}[damage])
    for arguments in (["--resume"], ["--prompt", "The", "--models", "rnn"]):
        with pytest.raises(SystemExit, match=r"cannot be read: .* train anew$") as ended:
            language_model.main(["--quick", *arguments])
        assert "\n" not in ended.value.code


def test_models_that_are_saved_are_named(output):
    """Where those asked for are not there; a missing one is said before another one writes."""
    with pytest.raises(SystemExit, match="is not there: train first"):
        language_model.main(["--quick", "--prompt", "The"])
    (output / "language_model-gru.pt").touch()
    (output / "language_model-rnn-quick.pt").touch()
    with pytest.raises(SystemExit, match=r"saved \(--models gru, --models rnn --quick\), or"):
        language_model.main(["--quick", "--prompt", "The"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--vocabulary", "-5"], "--vocabulary: '-5' is not a positive whole number"),
        (["--vocabulary", "many"], "'many' is not a positive whole number"),
        (["--extend", "0"], "--extend: '0' is not a positive whole number"),
        (["--extend", "-3"], "--extend: '-3' is not a positive whole number"),
        (["--sweep", "--prompt", "x"], "not allowed with argument --sweep"),
        (["--extend", "3", "--prompt", "x"], "not allowed with argument --extend"),
    ],
)
def test_refusals(arguments, words, capsys):
    with pytest.raises(SystemExit):
        language_model.main(["--quick", *arguments])
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_an_output_that_cannot_be_written_is_said_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(program, "OUTPUT", tmp_path / "file" / "output")
    with pytest.raises(SystemExit):
        memory_span.main(["--quick"])
    assert "nothing can be written to" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_vocabulary_is_at_most_what_was_asked_for(kind):
    """Or it is an error: these kinds spell every word, and need all characters for it."""
    learned, _ = text.paragraphs()
    for size in (3, len(set("".join(learned))) + 3):
        words = f"a vocabulary of {size} is too small for {kind}"
        with pytest.raises(SystemExit, match=words):
            text.train_tokenizer(kind, size, learned)


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("layers", models.LAYERS)
def test_models_see_no_future(layers, kind):
    """The score of a next token does not change with the tokens after it."""
    torch.manual_seed(0)
    tokens = torch.randint(4, 9, (2, 12))
    other = tokens.clone()
    other[:, 7:] = 4 + (other[:, 7:] - 3) % 5
    model = models.LanguageModel(layers, kind, 9, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens)[:, :7], model.logits(other)[:, :7])
        assert (model.logits(tokens)[:, 7:] != model.logits(other)[:, 7:]).any()


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("layers", models.LAYERS)
def test_padding_is_ignored(layers, kind):
    """The loss and all gradients are those of the rows one by one; <pad> itself has none."""
    torch.manual_seed(0)
    rows = [torch.tensor([text.BOS, *torch.randint(4, 20, (n,)), text.EOS]) for n in (3, 9, 6)]
    model = models.LanguageModel(layers, kind, 20, 32).double()
    model(*text.pad(rows)).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert not grads["embed.weight"][text.PAD].any()
    model.zero_grad()
    count = sum(len(row) - 1 for row in rows)
    for row in rows:
        (model(*text.pad([row])) * (len(row) - 1) / count).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], msg=name)


@pytest.mark.parametrize("kind", text.KINDS)
def test_tokenizers_keep_the_text(kind):
    """What is decoded is what was encoded, and the special tokens have the numbers they should."""
    learned, _ = text.paragraphs()
    tokenizer = text.train_tokenizer(kind, 10_000, learned[:200])
    assert [tokenizer.id_to_token(i) for i in range(4)] == list(text.SPECIAL)
    for paragraph in learned[:200]:
        assert tokenizer.decode(tokenizer.encode(paragraph).ids) == paragraph


def test_missing_package_is_named(tmp_path):
    """One line, not a traceback, where what the examples need is not installed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u; f = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'tokenizers' else f(name, *rest)\n"
    )
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "memory_span.py", "--quick"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        },
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "error: tokenizers missing: pip install 'pykernels[examples]'\n"


def test_readme_lines_run():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
