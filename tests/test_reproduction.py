"""examples/reproduction: its texts, its teacher and its exact match."""

from contextlib import nullcontext
from types import SimpleNamespace

import evaluate
import mlx.core as mx
import numpy as np
import prepare
import pytest
import teacher
import texts
from miniature import SIZES, save_tiny_teacher
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from reports import WORDS

from mlx_hydra.distill.config import Source
from mlx_hydra.distill.data import Sequences, tokens_file
from mlx_hydra.loading import load, load_tokenizer, read_config
from mlx_hydra.models.hydrahead import Model, ModelArgs
from mlx_hydra.select.probes import pairs_from_file

LENGTH = 160


@pytest.fixture(scope="module")
def writer():
    return texts.Writer()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(texts.TOKENIZER, read_config(texts.TOKENIZER))


@pytest.fixture(scope="module")
def tiny_teacher(tmp_path_factory):
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"))


def documents(writer, count, length=LENGTH, purpose="distill"):
    return [writer.document(texts.drawn_for(purpose, length, n), length) for n in range(count)]


# Texts


@pytest.mark.parametrize("length", [160, 512, 1024])
def test_documents_have_their_length_and_end_with_an_answer(writer, length):
    for document in documents(writer, 40, length):
        assert len(document.ids) == length
        assert sum(document.answers[-1]) == length
        for start, count in document.answers:
            assert document.ids[start + count - 1] == writer.encode.eos
            assert document.ids[:start].count(writer.encode.eos) < len(document.answers)


def test_every_answer_is_stated_once_in_its_report(writer):
    for document in documents(writer, 20, 512):
        report = writer.encode.pieces.decode(document.ids[1 : document.report])
        for start, count in document.answers:
            value = writer.encode.pieces.decode(document.ids[start : start + count - 1])
            assert value.strip() in report


def test_people_may_be_called_by_their_last_name(writer):
    def names(share):
        rng = texts.drawn_for("names", 320, 0)
        found = [writer.document(rng, 320, share) for _ in range(30)]
        assert {len(document.ids) for document in found} == {320}
        for document in found:
            report = writer.encode.pieces.decode(document.ids[1 : document.report])
            for start, count in document.answers:
                answer = writer.encode.pieces.decode(document.ids[start : start + count - 1])
                words = answer.split()
                if words[-1] in WORDS["last_names"]:
                    assert f" {' '.join(words)}." in report
                    yield len(words)

    assert set(names(0.0)) == {2}
    some = list(names(0.5))
    assert 0.3 < some.count(1) / len(some) < 0.7 and set(some) == {1, 2}


def test_any_length_can_be_filled(writer):
    rng = texts.drawn_for("test", 0, 0)
    for tokens in range(60):
        pieces = writer.report(rng, 200, 0.3)
        before = texts.size(pieces)
        writer.fill(rng, pieces, tokens)
        assert texts.size(pieces) == before + tokens


def test_the_tokenizer_reads_the_text_as_the_encoder_does(writer, tokenizer):
    exams = [d for task in texts.TASKS for d in texts.exams(writer, task, 320, range(4))]
    for document in documents(writer, 40) + exams:
        ids = tokenizer.encode(document.text, add_special_tokens=False)
        assert [*ids, writer.encode.eos] == document.ids


def test_documents_line_up_with_the_sequences_of_distill(writer, tokenizer, tmp_path):
    found = documents(writer, 12)
    path = tmp_path / "text.jsonl"
    prepare.write_lines(path, [prepare.as_line({"text": d.text}) for d in found])
    limit = 11 * LENGTH + 1
    tokens = tokens_file(tmp_path, [Source(file=str(path))], tokenizer, 2048, limit, "any")
    sequences = Sequences(tokens, LENGTH, seed=0)
    rows = np.array(sequences.rows(range(11)))
    expected = {tuple(document.ids) for document in found[:11]}
    assert {tuple(row[:-1]) for row in rows.tolist()} == expected
    assert (rows[:, -1] == writer.encode.bos).all()


def test_a_teachers_batch_marks_the_answers(writer, monkeypatch):
    monkeypatch.setattr(teacher, "_writer", writer)
    tokens, answers = teacher.make_batch((3, 4, LENGTH))
    rng = texts.drawn_for("teacher", LENGTH, 3)
    for row, asked in zip(tokens, answers):
        document = writer.document(rng, LENGTH, teacher.LAST_NAMES)
        assert row.tolist() == [*document.ids, writer.encode.bos]
        expected = [t for start, n in document.answers for t in document.ids[start : start + n]]
        assert row[1:][asked].tolist() == expected


def teacher_arguments(out, **changes):
    names = {
        "out": out,
        "minutes": 1.0,
        "total_minutes": None,
        "workers": 1,
        "tokens_a_step": 320,
        "no_compile": True,
    }
    return SimpleNamespace(**names | changes)


@pytest.fixture
def clock(writer, monkeypatch):
    """Training on a clock of ours: a step takes a second, one that compiles a minute."""
    now, lengths = [0.0], []
    monkeypatch.setattr(teacher, "_writer", writer)
    # Batches are made here, when they are asked for.
    pool = SimpleNamespace(apply_async=lambda f, args: SimpleNamespace(get=lambda: f(*args)))
    context = SimpleNamespace(Pool=lambda *_: nullcontext(pool))
    monkeypatch.setattr(teacher.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(teacher.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(teacher, "STAGES", [(160, 0.5), (320, 1.0)])

    def loss(model, tokens, answers, others, real=teacher.loss_and_accuracy):
        length = tokens.shape[1] - 1
        now[0] += 1.0 if lengths and lengths[-1] == length else 60.0
        lengths.append(length)
        return real(model, tokens, answers, others)

    monkeypatch.setattr(teacher, "loss_and_accuracy", loss)
    return lengths


def test_steps_that_compile_are_no_training_time(clock, tmp_path):
    args = teacher_arguments(tmp_path, minutes=10.0, total_minutes=0.1)
    progress = teacher.train(args, teacher.new_model(SIZES))
    # Six seconds; a stage ends when it has had more than its share of them.
    assert clock == [160] * 5 + [320] * 3
    assert (progress["step"], progress["seconds"]) == (8, 6.0)
    assert progress["stage_seconds"] == 2.0


def test_minutes_are_those_of_the_clock(clock, tmp_path):
    args = teacher_arguments(tmp_path, minutes=1.05, total_minutes=10.0)
    assert teacher.train(args, teacher.new_model(SIZES))["step"] == 4


def test_a_teacher_goes_on_from_its_state(clock, tmp_path):
    def run_of(*minutes):
        model = teacher.new_model(SIZES)
        for part in minutes:
            clock.clear()
            args = teacher_arguments(tmp_path / str(len(minutes)), minutes=part, total_minutes=9.0)
            args.out.mkdir(exist_ok=True)
            progress = teacher.train(args, model)
            # All but what the state holds is another's.
            model = teacher.new_model(SIZES)
        optimizer = teacher.optim.AdamW(1.0)
        restored = teacher.restore(args.out, model, optimizer)
        assert restored == progress
        return progress, dict(tree_flatten([model.parameters(), optimizer.state]))

    whole, resumed = run_of(63 / 60), run_of(61 / 60, 61 / 60)
    # The one has 3 steps after the one that compiles, the other 1 and 1.
    assert (whole[0]["step"], resumed[0]["step"]) == (4, 4)
    assert (whole[0]["seconds"], resumed[0]["seconds"]) == (3.0, 2.0)
    assert whole[1].keys() == resumed[1].keys()
    for name in whole[1]:
        if not name.endswith("learning_rate"):
            assert np.allclose(whole[1][name], resumed[1][name], atol=1e-4), name
    files = [path.stat().st_size for path in (tmp_path / "1" / "state").glob("*.safetensors")]
    assert len(files) == teacher.PIECES and max(files) < 1.5 * min(files) + 300_000
    assert not list((tmp_path / "1").glob("state.*"))


def test_a_teachers_weights_are_read_back(tiny_teacher):
    model = teacher.new_model(SIZES)
    before = dict(tree_flatten(model.parameters()))
    model.load_weights(teacher.read_weights(tiny_teacher))
    after = dict(tree_flatten(model.parameters()))
    name = "model.embed_tokens.weight"
    assert np.allclose(np.array(after[name]), 4 * np.array(before[name]))


def test_the_teachers_files_are_small(tmp_path):
    teacher.save_model(tmp_path, teacher.new_model({}), {})
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) == 2 and max(sizes) < 15 << 20
    assert load(str(tmp_path))[0].args.num_hidden_layers == 8


def test_other_tokens_count_more_in_the_end():
    weights = [teacher.weight_of_others(done) for done in (0.0, 0.3, 0.65, 0.9)]
    assert np.allclose(weights, [0.05, 0.05, 0.15, 0.25])


def test_an_exam_states_its_needle_where_it_should(writer):
    for number, document in enumerate(texts.exams(writer, "single", 1024, range(8))):
        assert document.report == 1024
        [(start, count)] = document.answers
        answer = document.ids[start : start + count - 1]
        at = [n for n in range(1024) if document.ids[n : n + len(answer)] == answer]
        depth = (0.5 + number * texts.GOLDEN_RATIO) % 1
        assert min(abs(n - depth * 1024) for n in at) < 60


def test_exams_ask_of_many_facts(writer):
    for document in texts.exams(writer, "multi_key", 1024, range(4)):
        assert (document.report, len(document.answers)) == (1024, 4)


def test_what_is_asked_was_not_trained_on(writer):
    def reports(found):
        return {writer.encode.pieces.decode(d.ids[1 : d.report]) for d in found}

    trained = [*documents(writer, 50, 512), *documents(writer, 50, 512, "teacher")]
    learnt = "\n".join(reports(trained))
    assert len(reports(trained)) == 100
    for task in texts.TASKS:
        for document in texts.exams(writer, task, 512, range(8)):
            # Not even a paragraph.
            text = writer.encode.pieces.decode(document.ids[1 : document.report])
            assert not any(p in learnt for p in text.split("\n") if len(p) > 200)
    assert (
        texts.drawn_for("exam single", 512, 0).random()
        != texts.drawn_for("distill", 512, 0).random()
    )


def test_probes_differ_in_the_answer_alone(writer, tokenizer, tmp_path):
    path = tmp_path / "probes.jsonl"
    prepare.write_lines(path, map(prepare.as_line, prepare.probes(writer, 200, 3)))
    pairs = pairs_from_file(path, tokenizer)
    assert [pair.capability for pair in pairs] == ["single", "multi_key"] * 3
    for pair in pairs:
        assert len(pair.prompt) == len(pair.counterfactual) == 200
        assert pair.prompt[0] == writer.encode.bos
        clean = [pair.prompt[n] for n in pair.changed]
        other = [pair.counterfactual[n] for n in pair.changed]
        assert set(clean) <= set(pair.answer) and set(other) <= set(pair.distractor)


# Exact match


def hydra():
    mx.random.seed(1)
    switches = {
        "head_order": "full_first",
        "full_attention_heads": [[0, 3], []],
        "full_attention": {"rope": False, "log_scale_base": 512, "gate": True},
        "linear_attention": {
            "kind": "gated_delta",
            "conv_kernel_size": 4,
            "rope": True,
            "gate": True,
        },
        "fusion": {"norm": True, "eps": 1e-6},
    }
    config = teacher.CONFIG | SIZES | switches | {"model_type": "hydrahead"}
    return Model(ModelArgs.from_dict(config))


@pytest.mark.parametrize("kind", ["qwen3", "hydrahead"])
def test_exact_match_is_what_greedy_decoding_writes(writer, kind, monkeypatch):
    monkeypatch.setattr(evaluate, "STEP", 48)
    # Two documents at a time.
    monkeypatch.setattr(evaluate, "TOKENS_AT_ONCE", 450)
    model = teacher.new_model(SIZES) if kind == "qwen3" else hydra()
    model.update(tree_map(lambda a: 4 * a if a.ndim == 2 else a, model.parameters()))
    found, expected = [], []
    for number, document in enumerate(documents(writer, 3)):
        ids, answers = document.ids[: 120 + 7 * number], []
        for turn in range(2):
            ids = ids + document.ids[5 : 12 + number]
            cache, count = make_prompt_cache(model), 3 + number
            steps = generate_step(mx.array(ids), model, max_tokens=count, prompt_cache=cache)
            said = [int(token) for token, _ in steps]
            wrong = (number + turn) % 3 == 2
            if wrong:
                said[-1] = (said[-1] + 1) % 2048
            answers.append((len(ids), count))
            expected.append(not wrong)
            ids = ids + said
        found.append(texts.Document("", ids, answers, 120))
    right = evaluate.right_answers(model, found)
    assert [answer for answers in right for answer in answers] == expected
    result = evaluate.evaluate(model, "single", 120, found)
    assert (result["questions"], result["right"]) == (6, sum(expected))
