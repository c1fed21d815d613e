"""The pages of runs and populations: their numbers, that they stand alone, their errors, and what a browser draws."""

import csv
import functools
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import image

from pcgjax import metrics, report
from pcgjax.pages import population as population_page
from pcgjax.pages import run as run_page
from pcgjax.pages.comparison import run_row, write
from pcgjax.pages.terminal import run_summary
from pcgjax.pages.words import COMPARED, WORDS
from pcgjax.published import CNN_PAPER, PAPER_METRICS
from pcgjax.runs.patients import judge_patients
from pcgjax.runs.results import PREDICTION_FIELDS, save_examples, surest
from pcgjax.segmentation.decoding import metronome
from pcgjax.segmentation.scores import SEGMENTATION_HEADLINE, best_median_worst, score_rates, score_states, summarise
from pcgjax.segmentation.states import state_spans

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RATE = 1000


def beats(seconds, murmur, rng):
    """S1 and S2 bursts at 70 a minute, with noise in systole where there is a murmur."""
    t = np.arange(int(seconds * RATE)) / RATE
    sound = 0.02 * rng.normal(size=len(t))
    for start in np.arange(0.1, seconds, 60 / 70):
        for offset, hz, width in ((0, 45, 0.03), (0.32, 65, 0.03)):
            sound += np.exp(-(((t - start - offset) / width) ** 2)) * np.sin(2 * np.pi * hz * t)
        sound += 0.3 * murmur * np.exp(-(((t - start - 0.16) / 0.06) ** 2)) * rng.normal(size=len(t))
    return sound.astype(np.float32)


def make_run(workdir, seed=0, databases=("cinc2016-a", "cinc2016-b"), words=("Normal", "MVP"), mark=""):
    """A finished run of 80 test and 20 validation recordings, in the files that train leaves."""
    rng = np.random.default_rng(seed)
    workdir.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(100):
        split = "test" if i < 80 else "validation"
        k = int(rng.integers(len(databases)))
        label = int(rng.random() < (0.7, 0.25)[k % 2])
        probability = round(float(1 / (1 + np.exp(-2 * (label - 0.5) - rng.normal()))), 4)
        rows.append({
            "id": f"{mark}r{i:03d}", "person": f"{split[0]}{rng.integers(30)}{mark}", "database": databases[k],
            "class": words[label], "label": label, "probability": probability, "decision": int(probability >= 0.5),
            "split": split, "path": f"/data/{i}.wav",
        })  # fmt: skip
    with (workdir / "predictions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, PREDICTION_FIELDS)
        writer.writeheader()
        writer.writerows(rows)

    def judged(split):
        own = [row for row in rows if row["split"] == split]
        column = {key: [row[key] for row in own] for key in PREDICTION_FIELDS}
        return metrics.judge(column["label"], column["probability"], column["person"], column["database"],
                             column["class"], resamples=100)  # fmt: skip

    results = {
        "test": judged("test"),
        "validation": judged("validation"),
        "control": {"shuffled_labels_auc": 0.4871, "what": f"trained on shuffled labels {mark}"},
        "system": {"jax": "0.10.2", "device": "cpu", "wall_s": 12.5, "command": f"python -m pcgjax.train {mark}"},
        "split": {"kind": "person", "people_apart": True, "notes": [f"Database a has tape codes only. {mark}"]},
        "data": {"recordings": 400, "prepared": f"runs/prepared{mark}"},
    }
    (workdir / "metrics.json").write_text(json.dumps(results))
    (workdir / "config.json").write_text(json.dumps({"seed": 0, "train": {"epochs": 5}, "note": f"{mark}"}))
    with (workdir / "metrics.jsonl").open("w") as file:
        for step in range(1, 151):
            line = {"step": step, "split": "train", "loss": 0.3 + 0.4 * np.exp(-step / 40), "epoch": step // 30}
            file.write(json.dumps(line) + "\n")
            if step % 30 == 0:
                line = {"step": step, "split": "validation", "loss": 0.4 + 0.3 * np.exp(-step / 40)}
                file.write(json.dumps({**line, "auc": 0.6 + step / 1000}) + "\n")
    chosen = surest([row for row in rows if row["split"] == "test"], 1)
    waveforms = {row["id"]: beats(7, row["label"], rng) for row in chosen["right"] + chosen["wrong"]}
    np.savez(workdir / "examples.npz", sample_rate_hz=RATE, **waveforms)
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = make_run(tmp_path_factory.mktemp("runs") / "cnn")
    assert run_page.write(workdir) == workdir / "report.html"
    return workdir


@pytest.fixture(scope="module")
def page(run):
    return (run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def judgement(run):
    return json.loads((run / "metrics.json").read_text())["test"]


def cells(page, first):
    """The cells of the table row that begins with the heading `first`, tags taken out."""
    row = re.search(rf'<tr><th scope="row">(?:<b>)?{re.escape(first)}(?:</b>)?</th>(.*?)</tr>', page, re.S)
    assert row, f"no row {first}"
    return [re.sub("<.*?>", " ", cell).split() for cell in re.findall("<td.*?>(.*?)</td>", row[1], re.S)]


def links(page):
    return re.findall(r'(?:src|href)="([^"]*)"', page)


# --- the page of a run


@pytest.mark.parametrize("metric", ["auc", "mean_accuracy", "f1", "accuracy", "sensitivity", "specificity", "auprc"])
def test_headline_shows_value_and_interval(page, judgement, metric):
    s = judgement["overall"][metric]
    cards = re.findall(r'<h3>([^<]*)</h3><p class="big">(.*?)</p>.*?interval (.*?)</p>', page, re.S)
    want = (WORDS[metric], f"{s['value']:.3f}", f"{s['low']:.3f}–{s['high']:.3f}")
    assert cards.count(want) == 1


def test_mean_database_auc_comes_first(page, judgement):
    first = re.findall(r'<h3>(.*?)</h3><p class="big">(.*?)</p>', page)[0]
    assert first == ("Mean AUC over databases", f"{judgement['mean_database_auc']['value']:.3f}")


def test_tables_show_the_values(page, judgement):
    auc = cells(page, "AUC")
    s, trivial = judgement["overall"]["auc"], judgement["trivial"]
    assert auc[0] == [f"{s['value']:.3f}", f"{s['low']:.3f}–{s['high']:.3f}"]
    assert [c[0] for c in auc[2:]] == [
        f"{trivial[k]['auc']:.3f}" for k in ("all_abnormal", "all_normal", "majority", "database_prior")
    ]
    assert cells(page, "Precision")[3] == ["n/a"]  # always normal: undefined, not 0
    for database, scores in judgement["per_database"].items():
        row = cells(page, database)
        assert [int(c[0]) for c in row[:3]] == [scores[k] for k in ("recordings", "people", "positives")]
        assert row[3][0] == f"{scores['auc']['value']:.3f}"
    for word, scores in judgement["per_class"].items():
        found = [cells(part, word) for part in page.split('<th scope="col">Called abnormal')[1:]]
        assert found[0][0] == [str(scores["recordings"])]
        assert found[0][1] == [f"{scores['mean_probability']:.3f}"]


def test_confusion_matrix_holds_the_counts(page, judgement):
    (table,) = re.findall(r'<table class="confusion">.*?</table>', page, re.S)
    shown = [int(n) for n in re.findall("<b>(.*?)</b>", table)]
    assert shown == [judgement["counts"][k] for k in ("tn", "fp", "fn", "tp")]


def test_figures_are_there_with_alternative_text(page, judgement):
    alts = re.findall(r'<svg viewBox="[^"]*" role="img" aria-label="([^"]+)"', page)
    assert len(alts) == 7  # ROC, PR, reliability, losses, databases, and two examples
    assert any(f"AUC {judgement['overall']['auc']['value']:.3f}" in alt for alt in alts)
    assert sum(alt.startswith("Waveform and spectrogram") for alt in alts) == 2
    # Colours of figures are the theme's: nothing drawn in the light theme's ink stays in the dark one.
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    assert "var(--ink)" in drawn
    assert not re.search("#1b2430|#000000", drawn)


def test_ids_of_figures_do_not_collide(page):
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(set(ids)) == len(ids)
    assert {link[1:] for link in links(page) if link.startswith("#")} <= set(ids)
    assert set(re.findall(r"url\(#(.*?)\)", page)) <= set(ids)


def test_page_stands_alone(page):
    assert "http" not in page.replace("http-equiv", "")
    assert links(page)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links(page))
    assert "<script" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_page_says_what_it_rests_on(page, run):
    assert "Judged on held-out people" in page
    assert "Database a has tape codes only." in page
    assert "<pre>python -m pcgjax.train </pre>" in page
    assert "&#34;epochs&#34;: 5" in page
    assert "0.4871" in page
    for word in ("probability of abnormal", "Right and confident", "Wrong and confident"):
        assert word in page


def test_drawing_again_gives_the_same_file(run, page, tmp_path):
    copy = shutil.copytree(run, tmp_path / "cnn")
    run_page.write(copy)
    assert (copy / "report.html").read_text(encoding="utf-8") == page
    assert not list(copy.glob("*.part"))


def test_shared_people_are_told(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "cnn")
    text = (copy / "predictions.csv").read_text().splitlines()
    row = next(csv.DictReader([text[0], text[1]]))
    text[-1] = ",".join({**row, "id": "again", "split": "validation"}.values())
    (copy / "predictions.csv").write_text("\n".join(text) + "\n")
    (copy / "examples.npz").unlink()
    page = run_page.write(copy).read_text()
    assert "1 person is both in validation and in test" in page
    assert "Judged on held-out people" not in page


def test_everything_from_data_is_escaped(tmp_path):
    nasty = "<script>alert(1)</script>&\"'$x_1$"
    workdir = make_run(tmp_path / "nasty", databases=(nasty, "b"), words=("normal", nasty), mark=nasty)
    page = run_page.write(workdir).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in page
    figures = "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    assert "$x_1$" in figures  # a name is never read as mathematics


def test_only_metrics_are_needed(run, tmp_path):
    results = json.loads((run / "metrics.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps({"test": results["test"]}))
    page = run_page.write(tmp_path).read_text()
    for sentence in ("predictions.csv has no test rows", "no metrics.jsonl", "no examples.npz", "no config.json"):
        assert sentence in page
    assert "does not say whether people of the test set" in page


def test_patients_of_circor_are_told(run, tmp_path):
    shutil.copytree(run, tmp_path / "circor")
    results = json.loads((tmp_path / "circor" / "metrics.json").read_text())
    rows = [{"person": str(i // 3), "database": "circor"} for i in range(60)]
    labels, probabilities = np.repeat(np.arange(20) % 2, 3), np.random.default_rng(0).random(60)
    patients = judge_patients(rows, labels, probabilities, "murmur", 0.5, 50, 0)
    results["test"]["patients"] = patients
    (tmp_path / "circor" / "metrics.json").write_text(json.dumps(results))
    text = run_page.write(tmp_path / "circor").read_text()
    assert "Patient by patient" in text
    assert "CirCor&#39;s 20 patients of 60 recordings" in text or "CirCor's 20 patients of 60 recordings" in text
    assert f"{patients['rules']['max']['weighted_accuracy']['value']:.3f}" in text
    assert "Patient by patient" not in run_page.write(run).read_text()
    lines = run_summary(results).splitlines()
    assert lines[-1].startswith("CirCor's 20 patients, Weighted murmur accuracy: max 0.")
    assert "always present 0.833, always absent 0.167" in lines[-1]


def test_one_class_only(tmp_path):
    labels, p = np.zeros(12, int), np.linspace(0, 0.9, 12)
    test = metrics.judge(labels, p, [str(i) for i in range(12)], ["a"] * 12, ["normal"] * 12, resamples=20)
    (tmp_path / "metrics.json").write_text(json.dumps({"test": test}))
    page = run_page.write(tmp_path).read_text()
    assert re.search(r'<h3>AUC</h3><p class="big">n/a</p>', page)
    assert "one class only" in page


def test_scores_of_another_task(tmp_path):
    test = {"onset_f1": {"value": 0.971, "low": 0.96, "high": 0.98}, "frame_accuracy": 0.917}
    (tmp_path / "metrics.json").write_text(json.dumps({"test": test}))
    page = run_page.write(tmp_path).read_text()
    assert '<h3>onset f1</h3><p class="big">0.971</p>' in page
    assert cells(page, "Frame accuracy") == [["0.917"]]


# --- the page of a segmenter


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """A run of 12 simulated recordings, and what its metrics.json says."""
    workdir = tmp_path_factory.mktemp("runs") / "segmenter"
    workdir.mkdir()
    rng = np.random.default_rng(0)
    log_duration = np.log(np.full((4, 30), 1 / 30))
    ours, trivial, examples = [], [], []
    for i in range(12):
        samples = beats(10, False, rng)
        truth = np.r_[[0] * 40, np.tile(np.repeat([1, 2, 3, 4], (5, 11, 4, 23)), 10)[:440], [0] * 20].astype(np.int8)
        predicted = np.where(truth == 0, 4, np.roll(truth, i % 5 - 1))
        predicted[100 : 100 + 20 * i] = 1
        ours.append(score_states(truth, predicted, 0.02))
        trivial.append(score_states(truth, metronome(truth, 0.02, log_duration), 0.02))
        examples.append({
            "id": f"r<{i}>", "samples": samples, "sample_rate_hz": RATE, "truth": state_spans(truth, 0.02),
            "predicted": state_spans(predicted, 0.02), "score": score_rates(ours[-1]),
        })  # fmt: skip
    chosen = best_median_worst(ours)
    persons = [str(i // 2) for i in range(12)]
    found = {name: summarise(s, persons, 50) for name, s in (("test", ours), ("metronome", trivial))}
    results = {"segmentation": {**found, "recordings": 12, "people": 6, "intervals": {"resamples": 50}}}
    (workdir / "metrics.json").write_text(json.dumps(results))
    line = {"step": 1, "split": "validation", "loss": 1.0, "frame_accuracy": 0.5}
    (workdir / "metrics.jsonl").write_text("\n".join(json.dumps({**line, "step": step}) for step in (1, 2)))
    assert save_examples(workdir, [examples[i] for i in chosen[::-1]]) == workdir / "segments.npz"
    return run_page.write(workdir), found, [examples[i] for i in chosen]


def test_segmenter_beside_the_metronome(segmenter):
    path, found, _ = segmenter
    page = path.read_text()
    assert "12 test recordings · 6 people" in page
    assert "people, not recordings, are resampled" in page
    for metric, name in WORDS.items():
        if metric in found["test"]:
            row = cells(page, name.replace("'", "&#39;"))
            assert len(row) == 2
            for cell, answer in zip(row, ("test", "metronome"), strict=True):
                s = found[answer][metric]
                between = [] if s["low"] is None else [f"{s['low']:.3f}–{s['high']:.3f}"]
                assert cell == [page_number(s["value"]), *between]
    cards = dict(re.findall(r'<h3>([^<]*)</h3><p class="big">(.*?)</p>', page))
    assert cards == {WORDS[m]: f"{found['test'][m]['value']:.3f}" for m in SEGMENTATION_HEADLINE}
    assert f"a metronome ({found['metronome']['onset_f1_60ms']['value']:.3f})" in page
    assert "Frame accuracy on validation" in page


def page_number(value):
    return "n/a" if value is None else f"{value:.3f}"


def test_segmented_recordings_from_best_to_worst(segmenter):
    path, _, examples = segmenter
    page = path.read_text()
    figures = re.findall(
        r'<figure class="card"><h3>(\w+)</h3>(.*?)<figcaption><b>(.*?)</b>(.*?)</figcaption>', page, re.S
    )
    assert [(kind, name) for kind, _, name, _ in figures] == [
        (kind, e["id"].replace("<", "&lt;").replace(">", "&gt;"))
        for kind, e in zip(("Best", "Median", "Worst"), examples, strict=True)
    ]
    for (_, figure, _, caption), example in zip(figures, examples, strict=True):
        assert f"{example['score']['frame_accuracy']:.3f}" in caption
        assert "8 of 10 s" in caption
        words = re.findall(r"<text[^>]*>([^<]+)</text>", figure)
        assert {"truth", "predicted", "S1", "systole", "S2", "diastole"} <= set(words)
        # A bar of each S1 in view, of truth and prediction, and the legend's.
        shown = [a for name in ("truth", "predicted") for a, b, s in example[name] if s == 1 and b > 0.8 and a < 8.8]
        assert figure.count("fill: var(--blue)") >= 1 + len(shown)


def test_segmenter_without_examples(segmenter, tmp_path):
    (tmp_path / "metrics.json").write_text((segmenter[0].parent / "metrics.json").read_text())
    assert "no segments.npz" in run_page.write(tmp_path).read_text()
    rows = [run_row(tmp_path, name) for name in "ab"]
    page = write(rows, tmp_path / "both.html", "t").read_text()
    told = cells(page, '<span class="muted">a metronome</span>')
    assert [f"{segmenter[1]['metronome']['onset_f1_60ms']['value']:.3f}"] in told


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("segments.npz", "not a zip", r"segments\.npz: not a readable"),
        ("segments.npz", {"examples": '[{"id": "a"}]', "samples_0": np.zeros(9)}, r"no sample_rate_hz, truth, pred"),
        ("segments.npz", {"examples": '[{"id": "a"}]'}, r"not a readable .*samples_0.*delete"),
        ("metrics.json", '{"segmentation": {"test": {}}}', r"metrics\.json: no object `metronome` in `segmentation`"),
    ],
)
def test_damage_of_a_segmenters_files_is_named(segmenter, tmp_path, name, content, message):
    copy = shutil.copytree(segmenter[0].parent, tmp_path / "segmenter")
    if isinstance(content, str):
        (copy / name).write_text(content)
    else:
        np.savez(copy / name, **content)
    with pytest.raises(ValueError, match=message):
        run_page.write(copy)


def test_examples_to_save_must_be_whole(segmenter, tmp_path):
    example = {k: v for k, v in segmenter[2][0].items() if k != "truth"}
    with pytest.raises(ValueError, match=r"examples\[0\]: no field 'truth'"):
        save_examples(tmp_path, [example])
    assert not list(tmp_path.iterdir())


# --- errors


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.json", None, r"metrics\.json: no such file.*pcgjax\.train"),
        ("metrics.json", '{"test":\n {"a": 1', r"metrics\.json, line 2: not JSON"),
        ("metrics.json", '{"validation": {}}', r"metrics\.json: no object `test`"),
        ("config.json", "[1]", r"config\.json: need a JSON object, found list"),
        ("metrics.jsonl", '{"step": 1, "sp\n{"step": 2, "split": "train"}\n', r"\.jsonl, line 1: not JSON.*remove"),
        ("metrics.jsonl", '{"step": 1, "split": "dev"}\n', r"metrics\.jsonl, line 1: need .*validation"),
        ("predictions.csv", "id,label\na,1\n", r"predictions\.csv, line 1: no column person, database"),
        ("predictions.csv", "{head}\na,p,d,c,1,1.5,1,test,x\n", r"predictions\.csv, line 2, probability.*'1\.5'"),
        ("predictions.csv", "{head}\na,p,d,c,-1,0.5,1,test,x\n", r"predictions\.csv, line 2, label.*'-1'"),
        ("predictions.csv", "{head}\na,p,d,c,1\n", r"predictions\.csv, line 2: not 9 columns"),
        ("predictions.csv", "{head}\na,p,d,c,1,0.5,1,test,x\n", r"1 test rows.*judges 80.*evaluate again"),
        ("examples.npz", "not a zip", r"examples\.npz: not a readable \.npz.*delete"),
    ],
)
def test_damage_is_named_with_file_line_and_fix(run, tmp_path, name, text, message):
    copy = shutil.copytree(run, tmp_path / "cnn")
    (copy / "report.html").unlink()
    if text is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(text.replace("{head}", ",".join(PREDICTION_FIELDS)))
    with pytest.raises(ValueError, match=message):
        run_page.write(copy)
    assert not list(copy.glob("report.html*"))


def test_a_cut_last_line_of_the_log_is_forgiven(run, page, tmp_path):
    copy = shutil.copytree(run, tmp_path / "cnn")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 151, "sp')
    assert run_page.write(copy).read_text(encoding="utf-8") == page


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"r000": np.zeros(9)}, "sample_rate_hz: need one positive number"),
        ({"sample_rate_hz": 1000, "stranger": np.zeros(9)}, "'stranger' is not in predictions"),
        ({"sample_rate_hz": 1000, "r000": np.full(9, np.nan)}, "r000: need"),
    ],
)
def test_bad_examples_are_named(run, tmp_path, arrays, message):
    copy = shutil.copytree(run, tmp_path / "cnn")
    np.savez(copy / "examples.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        run_page.write(copy)


# --- the examples


def row(name, person, label, probability):
    return {"id": name, "person": person, "database": "d", "label": label, "probability": probability,
            "decision": int(float(probability) >= 0.5)}  # fmt: skip


def test_surest():
    rows = [row("a", "1", 1, 0.9), row("b", "2", 1, 0.99), row("c", "2", 1, 0.98), row("d", "3", 0, 0.1),
            row("e", "4", 0, 0.3), row("f", "5", 0, 0.8), row("g", "6", 1, 0.4)]  # fmt: skip
    names = {k: [r["id"] for r in v] for k, v in surest(rows, 3).items()}
    # abnormal and normal in turns, surest first; c is a second recording of b's person
    assert names == {"right": ["b", "d", "a"], "wrong": ["g", "f"]}
    assert [r["id"] for r in surest(rows, 9)["right"]] == ["b", "d", "a", "e"]
    as_text = [{k: str(v) for k, v in r.items()} for r in rows]
    assert [r["id"] for r in surest(as_text, 3)["right"]] == ["b", "d", "a"]
    assert surest([], 3) == {"right": [], "wrong": []}


# --- comparisons


@pytest.fixture(scope="module")
def comparison(run, tmp_path_factory):
    base = tmp_path_factory.mktemp("sweep")
    other = make_run(base / "other", seed=1)
    rows = [run_row(run, "Filter"), run_row(other, "Filter + <Noise>")]
    return rows, write(rows, base / "page.html", "Four & more", CNN_PAPER).read_text()


def test_comparison_shows_runs_beside_the_paper(comparison):
    rows, page = comparison
    for row, name in zip(rows, ("Filter", "Filter + &lt;Noise&gt;"), strict=True):
        rest = [m for m in COMPARED if m in row["metrics"] and m not in PAPER_METRICS]
        want = [f"{row['metrics'][m]['value']:.3f}" for m in (*PAPER_METRICS, *rest)]
        assert [c[0] for c in table_row(page, "table", name)] == want
    paper = table_row(page, "table", "the paper")
    assert [c[0] for c in paper[:5]] == ["0.9734", "0.9993", "1.0000", "0.9470", "0.9728"]
    assert page.count(">the paper<") >= 2  # in the figure's legend and in the table, of the one run it has
    assert "301 recordings" in page
    assert "probably contaminated" in page
    assert "their baselines differ" in page
    assert "Four &amp; more" in page
    assert re.search("Training loss over steps. Filter ends at 0.3", page)  # not every line has an epoch
    assert re.search("Validation loss over steps. Filter ends at 0.4", page)
    assert re.search("AUC on validation over steps. Filter ends at 0.75", page)
    assert "http" not in page.replace("http-equiv", "")


def test_comparison_without_paper_or_history(comparison, tmp_path):
    rows, _ = comparison
    rows = [{**rows[0], "history": tmp_path / "none.jsonl"}, {"name": "bare", "metrics": {"auc": {"value": 0.75}}}]
    page = write(rows, tmp_path / "page.html", "t").read_text()
    assert "metrics.jsonl is missing: Filter, bare" in page
    assert table_row(page, "table", "bare")[:2] == [["–"], ["0.750"]]
    assert "config.json is missing: bare" in page
    assert "run.json is missing: bare" in page
    assert "paper" not in page.split("<body>")[1].lower()


def test_names_of_runs_are_escaped_in_sentences_and_tables(tmp_path):
    nasty = "<i>&'\"</i>"
    rows = [{"name": name, "metrics": {"auc": {"value": 0.75}}} for name in (nasty, "b")]
    page = write(rows, tmp_path / "page.html", nasty).read_text()
    assert "<i>" not in page
    shown = "&lt;i&gt;&amp;&#39;&#34;&lt;/i&gt;"
    # In title and heading, in a table, in an alternative text, and in the sentences of what is missing.
    assert page.count(f"{shown}</title>") == page.count(f"{shown}</h1>") == page.count(f"<b>{shown}</b>") - 1 == 1
    assert page.count(f"is missing: {shown}, b.") == 3


def test_comparison_refuses_bad_rows(tmp_path):
    good = {"name": "a", "metrics": {}}
    refused: dict[str, list] = {
        "nothing": [], r"rows\[0\]: no field 'metrics'": [{"name": "a"}], "one name": [good, good]
    }  # fmt: skip
    for message, rows in refused.items():
        with pytest.raises(ValueError, match=message):
            write(rows, tmp_path / "page.html", "t")
    assert not list(tmp_path.iterdir())


def table_row(page, of, first):
    """Like `cells`, of a section's own tables; the heading as it is read."""
    for head, row in re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', section(page, of), re.S):
        if re.sub("<.*?>", "", head) == first:
            return [re.sub("<.*?>", " ", cell).split() for cell in re.findall("<td.*?>(.*?)</td>", row, re.S)]
    raise AssertionError(f"no row {first} in {of}")


def section(page, name):
    return page.split(f'<section id="{name}">')[1].split("</section>")[0]


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_comparison_shows_what_differs_and_what_it_took(run, tmp_path):
    a, b = (shutil.copytree(run, tmp_path / name) for name in "ab")
    start = {"versions": {"jax": "0.10.2", "numpy": "2.0"}, "device": "cpu", "git": {"commit": 40 * "a", "dirty": True}}
    for folder, rate, numpy, epoch in ((a, 0.01, "2.0", 7), (b, 0.03, "2.1", 9)):
        config = {"seed": 0, "optimizer": {"learning_rate": rate}, "train": {"epochs": 9, "batch_recordings": 4}}
        (folder / "config.json").write_text(json.dumps(config | ({"only": "<b>"} if folder == b else {})))
        change(folder / "metrics.json", best={"epoch": epoch, "metric": "loss", "score": -0.4321}, epochs=9,
               data={"train_recordings": 30, "steps_an_epoch": 10},
               system={"seconds": {"train": 7.25, "wait": 1.5}, "goodput": 0.934, "wall_s": 20.0})  # fmt: skip
        last = start | {"versions": start["versions"] | {"numpy": numpy}, "command": f"train --x={rate}"}
        (folder / "run.json").write_text(json.dumps({"starts": [start, last]}))
        lines = [{"step": 10 * e, "split": "train", "loss": 1 / e, "epoch": e, "seconds": s}
                 for e, s in ((1, 60.0), (2, 62.0), (3, 64.0), (4, 1.0), (5, 3.0))]  # fmt: skip
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = write([run_row(a), run_row(b)], tmp_path / "page.html", "t").read_text()
    assert table_row(page, "differences", "optimizer.learning_rate") == [["0.01"], ["0.03"]]
    assert table_row(page, "differences", "only") == [["–"], ["&lt;b&gt;"]]
    assert "train.epochs" not in section(page, "differences")
    # Three times ten steps of three recordings took two seconds; the first line has the compiling, the fourth is the
    # first after a resume.
    chosen = ["7", "of", "9", "loss", "0.432", "on", "validation"]
    taken = [["15.0"], ["7.2"], ["1.5"], ["20.0"], ["93%"], ["2", "times"]]
    assert table_row(page, "speed", "a") == [chosen, *taken]
    heads = re.findall('<th scope="col">(.*?)</th>', section(page, "speed"))
    assert heads[3:7] == ["Train (s)", "Data wait (s)", "In all (s)", "Goodput"]
    assert table_row(page, "setup", "versions.numpy") == [["2.0"], ["2.1"]]
    assert "versions.jax" in section(page, "setup").split("The same in all")[1]
    assert "aaaaaaaaaaaa and changes" in section(page, "setup").split("The same in all")[1]
    assert "<pre>train --x=0.03</pre>" in page
    assert "Training loss over epochs. a ends at 0.200" in page
    assert "not judged on the same" not in page


def test_comparison_warns_where_the_people_differ(run, tmp_path):
    other = make_run(tmp_path / "other", seed=5)
    page = write([run_row(run), run_row(other)], tmp_path / "page.html", "t").read_text()
    people = []
    for folder in (run, other):
        with (folder / "predictions.csv").open() as file:
            people.append({(r["database"], r["person"]) for r in csv.DictReader(file) if r["split"] == "test"})
    assert people[0] != people[1]
    said = f"cnn on {len(people[0])}, other on {len(people[1])}; {len(people[0] & people[1])} in common"
    assert said in page
    assert "not judged on the same people" in page


def test_runs_of_every_kind_stand_side_by_side(run, segmenter, tmp_path):
    pretrained, llm = tmp_path / "pretrained", tmp_path / "llm"
    for folder in (pretrained, llm):
        folder.mkdir()
    (pretrained / "metrics.json").write_text(json.dumps({"test": {"loss": 0.25, "accuracy": 0.75}}))
    score = {"value": 0.5, "low": 0.4, "high": 0.6}
    judged = {"test": {"mean": {"accuracy": score, "majority_accuracy": 0.45},
                       "patients": {"weighted_accuracy": None}}}  # fmt: skip
    (llm / "metrics.json").write_text(json.dumps({"runs": {"llm": judged}}))
    write_population(tmp_path / "seeds")
    folders = (run, segmenter[0].parent, pretrained, llm, tmp_path / "seeds")
    rows = [run_row(folder) for folder in folders]
    page = write(rows, tmp_path / "page.html", "t").read_text()
    heads = re.findall('<th scope="col">(.*?)</th>', section(page, "table"))[1:]
    names = ("segmenter", "pretrained", "llm", "seeds (mean of 6)", "the majority class (llm)")
    shown = {name: dict(zip(heads, table_row(page, "table", name), strict=True)) for name in names}
    assert shown["llm"]["Mean accuracy over tasks"] == ["0.500", "0.400–0.600"]
    assert shown["the majority class (llm)"]["Mean accuracy over tasks"] == ["0.450"]
    assert shown["llm"]["AUC"] == ["–"]
    assert shown["pretrained"]["loss"] == ["0.250"]
    assert shown["pretrained"]["Accuracy"] == ["0.750"]
    assert shown["segmenter"]["Onset F1 (60 ms)"][0] == f"{segmenter[1]['test']['onset_f1_60ms']['value']:.3f}"
    assert shown["seeds (mean of 6)"]["AUC"] == ["0.700", "0.650–0.750"]

    (llm / "metrics.json").write_text(json.dumps({"runs": {"a": judged, "b": judged}}))
    with pytest.raises(ValueError, match="2 audio LLMs side by side already"):
        run_row(llm)
    (llm / "metrics.json").write_text(json.dumps({"runs": {"a": {}}}))
    with pytest.raises(ValueError, match=r"metrics\.json, runs: not what"):
        run_row(llm)


# --- populations


def write_population(workdir, fields=("seed", "optimizer.learning_rate")):
    """Six members, 2 seeds x 3 learning rates; the fifth is the best by validation."""
    workdir.mkdir()
    members = []
    for i in range(6):
        own = {"seed": i % 2, "optimizer.learning_rate": 10.0 ** (i // 2 - 3), "model.name": "<cnn>"}
        score = (0.5, 0.52, 0.6, 0.62, 0.8, 0.7)[i]
        members.append({
            "fields": {field: own[field] for field in fields},
            "best": {"epoch": i + 1, "score": score}, "validation": {"auc": score, "loss": 0.5},
            "test": {"auc": score - 0.01, "accuracy": None if i == 0 else 0.9},
            "curve": {"loss": [0.7, None, 0.5, 0.4, 0.3, 0.2 + i / 100], "validation": [score] * 6},
        })  # fmt: skip
    summary = {"auc": {"mean": 0.7, "deviation": 0.05, "low": 0.65, "high": 0.75, "n": 6}}
    trivial = {"all_abnormal": {"auc": 0.5}, "database_prior": {"auc": 0.66}}
    found = {"members": members, "selected": 4, "select": "auc", "trivial": trivial, "summary": summary}
    (workdir / "population.json").write_text(json.dumps(found))
    return workdir


def test_population_page(tmp_path):
    assert report.report([str(write_population(tmp_path / "sweep"))]) == tmp_path / "sweep" / "report.html"
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "6 members · seed, optimizer.learning_rate" in page
    assert '<h3>AUC</h3><p class="big">0.700 <span class="small">± 0.050</span>' in page
    assert '<span class="warn">not clearly above</span> the database alone (0.660)' in page
    assert table_row(page, "members", "4 ★ best by validation") == [["0"], ["0.1"], ["5"], ["0.800"], ["0.790"]]
    rows = re.findall('<tr><th scope="row">(.*?)</th>', section(page, "members"))
    assert [re.sub("<.*?>", "", row)[:1] for row in rows[:6]] == ["4", "5", "3", "2", "1", "0"]
    # Of 0.5, 0.52, 0.6, 0.62, 0.8, 0.7.
    assert table_row(page, "members", "Mean")[3] == ["0.623", "±", "0.113"]
    assert table_row(page, "swept", "learning_rate 0.1") == [["2"], ["0.750", "±", "0.071"], ["0.740", "±", "0.071"]]
    assert "AUC on validation of each member against optimizer.learning_rate" in page
    assert "against seed" not in page
    assert "Training loss of each member over epochs. Ends between 0.200 and 0.250." in page
    words = re.findall(r"<text[^>]*>([^<]+)</text>", section(page, "swept"))
    assert {"0.001", "0.01", "0.1"} <= set(words)
    assert "http" not in page.replace("http-equiv", "")


def test_population_of_seeds_and_of_words(tmp_path):
    page = population_page.write_population(write_population(tmp_path / "seeds", ("seed",))).read_text()
    assert 'id="swept"' not in page
    workdir = write_population(tmp_path / "words", ("model.name",))
    found = json.loads((workdir / "population.json").read_text())
    for member in found["members"][:3]:
        member["fields"]["model.name"] = "lstm"
    (workdir / "population.json").write_text(json.dumps(found))
    page = population_page.write_population(workdir).read_text()
    assert table_row(page, "swept", "name &lt;cnn&gt;")[0] == ["3"]
    assert "against model.name" not in page


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"members": None}, "population.json, members: need a list, found None"),
        ({"members": [{"fields": {}}]}, r"population.json, members\[0\]: no object `best`"),
        ({"selected": 6}, "population.json, selected: 6 is none of 6 members"),
        ({"select": 1}, "population.json, select: need a str, found 1"),
    ],
)
def test_damage_of_a_population_is_named(tmp_path, values, message):
    workdir = write_population(tmp_path / "sweep")
    change(workdir / "population.json", **values)
    with pytest.raises(ValueError, match=message):
        population_page.write_population(workdir)
    assert not (workdir / "report.html").exists()


def test_command_line(run, tmp_path):
    a, b = (shutil.copytree(run, tmp_path / name / "cnn") for name in "ab")
    assert report.report([str(a), str(b)]) == tmp_path / "a" / "comparison.html"
    page = (tmp_path / "a" / "comparison.html").read_text()
    assert f"<b>{b}</b>" in page  # two runs called cnn are told apart by their paths
    with pytest.raises(ValueError, match="RUN"):
        report.report([])
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text("{}")
    (tmp_path / "other").mkdir()
    for name, message in {"none": "no such folder", "unfinished": "has not ended", "other": "not a run, there is no",
                          "a": r"a folder of runs: give \S+a/cnn$"}.items():  # fmt: skip
        for arguments in ([name], [name, "b/cnn"]):
            with pytest.raises(ValueError, match=message):
                report.report([str(tmp_path / a) for a in arguments])


def test_command_line_as_a_user_runs_it(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "cnn")
    (copy / "report.html").unlink()
    call = functools.partial(subprocess.run, capture_output=True, text=True, check=False)
    done = call([sys.executable, "-m", "pcgjax.report", str(copy)], cwd=pathlib.Path(report.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert (copy / "report.html").is_file()
    done = call([sys.executable, "-m", "pcgjax.report"], cwd=pathlib.Path(report.__file__).parents[1])
    assert (done.returncode, done.stderr[:20]) == (1, "error: no RUN given:")


# --- in a browser

PROBE = """<script>(async () => {
  const say = (key, value) => document.body.setAttribute("data-" + key, value);
  console.error("probe is heard");
  const figures = [...document.querySelectorAll("figure svg")];
  say("figures", figures.length);
  say("empty", figures.filter(f => f.getBBox().width < 50 || f.getBoundingClientRect().width < 100).length);
  say("wide", document.documentElement.scrollWidth - document.documentElement.clientWidth);
  const images = [...document.querySelectorAll("svg image")].map(i => {
    const image = new Image(); image.src = i.getAttribute("xlink:href") || i.href.baseVal; return image; });
  await Promise.all(images.map(i => i.decode()));
  say("images", images.filter(i => i.naturalWidth > 20 && i.naturalHeight > 20).length);
})()</script>"""


def chromium(tmp_path, url, *flags):
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
             "--disable-component-update", "--no-first-run", "--enable-logging=stderr", "--virtual-time-budget=4000",
             f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    command = [str(CHROMIUM), *quiet, *flags, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine")
def test_a_browser_draws_the_figures(run, page, tmp_path):
    shot = tmp_path / "page.png"
    _, console = chromium(tmp_path, (run / "report.html").as_uri(), "--window-size=1200,3000", f"--screenshot={shot}")
    assert console == []
    pixels = image.imread(shot)[..., :3]
    assert pixels.shape == (3000, 1200, 3)
    # The confusion matrix, curves and spectrograms bring colour: far from all pixels are grey or white.
    colourful = np.ptp(pixels, axis=-1) > 0.2
    assert colourful.sum() > 20_000
    assert colourful.any(axis=1).sum() > 500

    # The page forbids scripts, so a copy without that rule is asked what it holds.
    probed = tmp_path / "probed.html"
    probed.write_text(re.sub("<meta http-equiv.*?>", "", page).replace("</body>", PROBE + "</body>"))
    dom, console = chromium(tmp_path, probed.as_uri(), "--window-size=1200,3000", "--dump-dom")
    assert len(console) == 1  # what goes wrong on a page is heard here
    assert "probe is heard" in console[0]
    told = dict(re.findall(r'data-(\w+)="(-?\d+)"', dom))
    assert told == {"figures": "7", "empty": "0", "wide": "0", "images": "2"}
