"""Loss and the three kinds of accuracy against plain full-logits computations."""

import math

import pytest
import torch
from helpers import build

from plopfast.data.example import Example
from plopfast.support.errors import DataError, TrainingError
from plopfast.training.evaluate import choices_of, evaluate


def logprobs(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


def likelihood(model, prompt, completion):
    lp = logprobs(model, [*prompt, *completion])
    return sum(lp[len(prompt) - 1 + i, t].item() for i, t in enumerate(completion))


def some_examples(answers, count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        prompt = torch.randint(
            3, 300, (int(torch.randint(2, 12, (), generator=generator)),), generator=generator
        ).tolist()
        made.append(
            Example.after_prompt(
                (*prompt, *answers[i % len(answers)], 2),
                len(prompt),
                str(answers[i % len(answers)]),
                f"x:{i}",
                closing=1,
            )
        )
    return made


@pytest.mark.parametrize(
    "answers", [[(5,), (6,), (7,)], [(5, 6), (5, 7, 8), (9,), (6, 5)]], ids=["one token", "several tokens"]
)
def test_choice(answers, tokenizer):
    model, examples = build("llama"), some_examples(answers)
    choices = choices_of(examples)
    assert sorted(map(tuple, choices)) == sorted(answers)
    got = evaluate(model, examples, choices=choices, batch_tokens=64)
    loss = right = tokens = 0
    for e in examples:
        prompt, own = e.tokens[: e.start], e.tokens[e.start :]
        loss -= likelihood(model, prompt, own)
        tokens += len(own)
        right += max(answers, key=lambda a: likelihood(model, prompt, a)) == own[:-1]
    assert got.metric == "choice" and got.tokens == tokens and got.examples == 24
    assert got.loss == pytest.approx(loss / tokens, rel=1e-5)
    assert got.accuracy == pytest.approx(right / 24)
    for e, row in zip(examples, got.rows, strict=True):
        prompt, own = e.tokens[: e.start], e.tokens[e.start :]
        sums = {choice: likelihood(model, prompt, choice) for choice in map(tuple, choices)}
        assert row.tokens == len(own) and row.nats == pytest.approx(-likelihood(model, prompt, own), rel=1e-5)
        assert tuple(choices[row.answered]) == max(sums, key=sums.get)
        weights = {choice: math.exp(value) for choice, value in sums.items()}
        assert row.chance == pytest.approx(weights[own[:-1]] / sum(weights.values()), rel=1e-4)
        assert row.right == (tuple(choices[row.answered]) == own[:-1])


def test_an_answer_that_is_no_choice():
    rows = evaluate(build("llama"), some_examples([(5,), (6,)]), choices=[[6], [7]]).rows
    assert {row.answered for row in rows} <= {0, 1}
    assert [row.chance == row.right == 0 for row in rows] == [True, False] * 12


def test_the_parts_of_the_loss():
    """Answers and what ends them, whatever is learned before; plain text has neither, and an empty answer only its end."""
    model = build("llama")
    turns = Example((5, 6, 7, 2, 8, 9, 10, 11, 2), ((1, 4), (6, 9)), (6, 8), "x", "x:1")
    got = evaluate(model, [turns])
    lp = logprobs(model, turns.tokens)

    def mean(*places):
        return pytest.approx(-sum(lp[at - 1, turns.tokens[at]].item() for at in places) / len(places), rel=1e-5)

    assert got.loss == mean(1, 2, 3, 6, 7, 8) and got.answer_loss == mean(6, 7) and got.end_loss == mean(8)
    assert got.rows[0].chance == pytest.approx(math.exp(lp[5, 10] + lp[6, 11]), rel=1e-4)
    empty = evaluate(model, [Example.after_prompt((5, 6, 7, 2), 3, "", "x:1", closing=1)])
    assert empty.answer_loss is None and empty.end_loss == empty.loss
    plain = evaluate(model, [Example.after_prompt((5, 6, 7, 2), 1, None, "x:1")])
    assert plain.answer_loss is plain.end_loss is plain.rows[0].chance is None


def test_exact_match_and_token_accuracy():
    model, examples = build("llama"), some_examples([(5,), (6, 7)])
    greedy = []
    for e in examples:  # half of the rows answer what the model would say
        tokens = list(e.tokens[: e.start])
        for _ in range(2):
            tokens.append(int(logprobs(model, tokens)[-1].argmax()))
        greedy.append(Example.after_prompt(tuple(tokens), e.start, "x", e.where))
    mixed = [*greedy[:12], *examples[12:]]
    got = evaluate(model, mixed)
    assert got.metric == "exact-match" and 0.5 <= got.accuracy < 1
    plain = [Example.after_prompt(e.tokens, e.start, None, e.where) for e in mixed]
    token = evaluate(model, plain)
    hits = sum(
        int(logprobs(model, e.tokens)[i - 1].argmax()) == e.tokens[i]
        for e in plain
        for i in range(e.start, len(e.tokens))
    )
    assert token.metric == "token" and token.accuracy == pytest.approx(hits / token.tokens)
    assert token.loss == pytest.approx(got.loss)
    for rows, whole in ((mixed, got), (plain, token)):
        metrics = evaluate(model, rows)
        right = metrics.right
        assert metrics.accuracy == whole.accuracy == pytest.approx(sum(right) / 24) and len(right) == 24
        if rows is mixed:
            assert set(right) == {0.0, 1.0} and right[:12] == [1.0] * 12


def test_what_is_no_choice(tokenizer):
    assert choices_of(some_examples([(5,), (5, 6)])) is None, "one answer begins another"
    assert choices_of(some_examples([(5,)])) is None
    assert choices_of(some_examples([(i,) for i in range(3, 27)])) is None, "nearly all answers differ"
    assert choices_of([Example.after_prompt((1, 2), 1, None, "")] * 9) is None


def test_an_answer_with_two_tokenisations_is_no_choice(tokenizer):
    examples = some_examples([(5,), (6,)])
    odd = Example.after_prompt(
        (*examples[0].tokens[: examples[0].start], 7, 8, 2), examples[0].start, examples[0].completion, ""
    )
    assert choices_of(examples) and choices_of([*examples, odd]) is None


def test_the_loss_is_the_models_own(any_model, examples):
    from plopfast.data.batches import collate

    plain = any_model(**collate(examples[:8])).loss
    assert evaluate(any_model, examples[:8]).loss == pytest.approx(plain.item(), rel=1e-5)


def test_damaged_weights(llama):
    with torch.no_grad():
        llama.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="NaN or infinite"):
        evaluate(llama, some_examples([(5,)]))


def test_no_rows(llama):
    with pytest.raises(DataError):
        evaluate(llama, [])


def test_the_last_turn_is_the_answer(llama):
    """Earlier turns count for the loss alone, and so does what closes the answer."""
    earlier, prompt = (5, 6, 7, 8), (9, 10, 11)
    best = []
    for _ in range(2):
        best.append(int(logprobs(llama, [*earlier, *prompt, *best])[-1].argmax()))
    tokens = (*earlier, *prompt, *best, 3)
    right = Example(tokens, ((2, 4), (7, 10)), (7, 9), "yes", "x:1")
    wrong = Example((*tokens[:8], (best[1] + 1) % 300, 3), ((2, 4), (7, 10)), (7, 9), "no", "x:2")
    got = evaluate(llama, [right, wrong])
    assert got.metric == "exact-match" and got.right == [1.0, 0.0] and got.tokens == 10
    empty = Example((*earlier, *prompt), ((2, 4),), (7, 7), "", "x:3")
    assert evaluate(llama, [empty]).tokens == 2


def test_choices_of_the_last_turn(llama):
    """A row of two turns is judged by the likelihood of its last answer after all that comes before."""
    answers = [(20,), (21, 22)]
    rows = []
    for i in range(12):
        prompt = (5, 6, 30 + i, 8, 9, 10)
        own = answers[i % 2]
        rows.append(Example((*prompt, *own, 3), ((2, 4), (6, 7 + len(own))), (6, 6 + len(own)), str(own), f"x:{i}"))
    choices = choices_of(rows)
    assert sorted(map(tuple, choices)) == answers
    got = evaluate(llama, rows, choices=choices, batch_tokens=64)
    want = [
        float(max(answers, key=lambda a, row=row: likelihood(llama, list(row.tokens[:6]), list(a))) == answers[i % 2])
        for i, row in enumerate(rows)
    ]
    assert got.metric == "choice" and got.right == want


def test_an_empty_answer_is_judged_by_what_closes_it(llama):
    prompt = (9, 10, 11)
    best = int(logprobs(llama, prompt)[-1].argmax())
    rows = [Example((*prompt, end), ((3, 4),), (3, 3), "", "x:1") for end in (best, (best + 1) % 300)]
    assert evaluate(llama, rows).right == [1.0, 0.0]
