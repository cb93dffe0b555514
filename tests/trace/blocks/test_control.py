"""What control flow means when its test or its range is a value that only the run knows.

Most tests run one function twice, once with plain numbers and once with proxies whose program is then run, and want
the same results: recorded control flow means what Python's means.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
from fake_recorder import Trace, Value

from nnsight_vllm.errors import ControlFlowError, ScopeError
from nnsight_vllm.trace.blocks.poison import is_poison

Lift = Callable[[Trace, Any], Any]


def plain(trace: Trace, content: Any) -> Any:
    return content


def if_else(lift: Lift, n: int) -> tuple[object, ...]:
    x, kept = 1, "same"
    with Trace() as t:
        p = lift(t, n)
        if p > 2:
            x = p + 1
            y = p * 2
        else:
            y = 7
        z = x + y
    return x, y, z, kept


def if_without_else(lift: Lift, n: int) -> tuple[object, ...]:
    with Trace() as t:
        p = lift(t, n)
        x = p
        if p > 2:
            x = x * 10
            x += 1
    return (x,)


def elif_chain(lift: Lift, n: int) -> tuple[object, ...]:
    with Trace() as t:
        p = lift(t, n)
        if p > 4:
            x = 4
        elif p > 2:
            x = 2
        elif p > 1:
            x = p
        else:
            x = 0
    return (x,)


def nested_ifs(lift: Lift, n: int) -> tuple[object, ...]:
    x = y = 0
    with Trace() as t:
        p = lift(t, n)
        if p > 1:
            x = 1
            if p > 3:
                x = x + 10
                y = p
            x = x + 100
        elif n > 0:
            y = 5
    return x, y


def restores_before_the_other_path(lift: Lift, n: int) -> tuple[object, ...]:
    x = 1
    with Trace() as t:
        p = lift(t, n)
        if p > 2:  # noqa: SIM108
            x = 50
        else:
            x = x + 1
    return (x,)


def conditional_expression(lift: Lift, n: int) -> tuple[object, ...]:
    with Trace() as t:
        p = lift(t, n)
        x = p + 1 if p > 2 else p * 3 if p > 1 else 0
        y = [(p if p > i else i) for i in range(3)]
        a, b, c = y
    return x, a, b, c


def connectives(lift: Lift, n: int) -> tuple[object, ...]:
    with Trace() as t:
        p = lift(t, n)
        a = p and p + 1
        b = p or 9
        c = p > 1 and p < 4 and 5
        d = (p > 4 or p < 2) or p
        e = not p
        f = not (p > 1 and not p > 3)
        g = 0 or p
        h = None and p  # noqa: SIM223
    return a, b, c, d, e, f, g, h


def walrus_in_a_branch(lift: Lift, n: int) -> tuple[object, ...]:
    y = 0
    with Trace() as t:
        p = lift(t, n)
        x = (y := p + 1) if p > 2 else 3
    return x, y


def loop(lift: Lift, n: int) -> tuple[object, ...]:
    total = count = 0
    with Trace() as t:
        for item in lift(t, list(range(n))):
            total += item
            count = count + 1
            double = item * 2
            total = total + double
        after = total + count
    return total, count, after


def loop_with_an_if(lift: Lift, n: int) -> tuple[object, ...]:
    big = small = 0
    with Trace() as t:
        for item in lift(t, list(range(n))):
            if item > 1:
                big = big + item
            else:
                small = small + 1
    return big, small


def if_with_a_loop(lift: Lift, n: int) -> tuple[object, ...]:
    total = 1
    with Trace() as t:
        p = lift(t, n)
        if p > 2:
            for item in lift(t, [1, 2, 3]):
                total = total * item
    return (total,)


def nested_loops(lift: Lift, n: int) -> tuple[object, ...]:
    total = 0
    with Trace() as t:
        for a in lift(t, list(range(n))):
            for b in lift(t, [1, 10]):
                total = total + a * b
    return (total,)


def plain_loop_around_an_if(lift: Lift, n: int) -> tuple[object, ...]:
    total = 0
    with Trace() as t:
        p = lift(t, n)
        for i in range(5):
            if i == 3:
                break
            if not i:
                continue
            if p > i:
                total = total + i
        else:
            total = -1
    return total, i


def unchanged_names_stay_themselves(lift: Lift, n: int) -> tuple[object, ...]:
    text = "before"
    with Trace() as t:
        p = lift(t, n)
        if p > 2:
            text = "new"
            text = "before"
        if p > 2:  # noqa: SIM108
            mode = "m" + str(1)
        else:
            mode = "m" + str(1)
    return text, mode


CASES = [
    if_else,
    if_without_else,
    elif_chain,
    nested_ifs,
    restores_before_the_other_path,
    conditional_expression,
    connectives,
    walrus_in_a_branch,
    loop,
    loop_with_an_if,
    if_with_a_loop,
    nested_loops,
    plain_loop_around_an_if,
    unchanged_names_stay_themselves,
]


@pytest.mark.parametrize("n", range(6))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_recorded_control_flow_means_what_python_means(case: Callable[..., tuple[object, ...]], n: int) -> None:
    assert case(Trace.value, n) == case(plain, n)


@pytest.mark.parametrize("n", range(5))
def test_cond_blocks_mean_if_and_else(n: int) -> None:
    x, y, z = 1, 2, 3
    with Trace() as t:
        p = t.value(n)
        with t.cond(p > 2):
            x = p * 2
        with t.cond(p > 1) as c:
            y = x + 1
            w = 10
        with c.else_():
            y = y + 100
            z = 0
            w = 20
    assert (x, y, z, w) == (n * 2 if n > 2 else 1, x + 1 if n > 1 else 102, 3 if n > 1 else 0, 10 if n > 1 else 20)


def test_cond_blocks_nest_and_share_a_with() -> None:
    x = y = 0
    with Trace() as t:
        p = t.value(3)
        with t.cond(p > 1), t.cond(p > 2):
            x = 1
        with t.cond(p > 1):
            with t.cond(p > 5):
                y = 1
            y = y + 10
    assert (x, y) == (1, 10)


def test_a_cond_of_a_plain_test_is_recorded_all_the_same() -> None:
    x = 1
    with Trace() as t:
        with t.cond(False):
            x = 2
    assert x == 1 and t.recorder.calls == ["cond"]


def test_a_branch_is_recorded_once_and_side_effects_happen_once_each() -> None:
    seen = []
    with Trace() as t:
        p = t.value(1)
        seen.append("before")
        if p > 2:
            seen.append("then")
        else:
            seen.append("else")
        for _ in t.value([1, 2, 3]):
            seen.append("body")
    assert seen == ["before", "then", "else", "body"] and t.recorder.calls == ["cond", "loop"]


def test_plain_control_flow_records_nothing() -> None:
    with Trace() as t:
        if len([1]) and not [] and 1 < 2 < 3:
            x = "a" if 2 in {2} else "b"
    assert x == "a" and t.was_rewritten and t.recorder.calls == []


# -- names bound on one path ---------------------------------------------------------------------------------------------


def test_a_name_bound_in_one_branch_raises_at_its_use_with_both_lines() -> None:
    with pytest.raises(ScopeError, match=r"test_control.py:\d+: `y` .*one path only of the `if` at .*:\d+ .*line \d+"):
        with Trace() as t:
            if t.value(1) > 2:
                y = 1
            print(y)


def test_one_path_only_is_no_error_without_a_use() -> None:
    with Trace() as t:
        p = t.value(1)
        if p > 2:
            y = p
    assert is_poison(y)


def test_a_poison_keeps_the_values_of_its_paths() -> None:
    name: Any = "text"
    with Trace() as t:
        p = t.value(1)
        if p > 2:
            first = p * 3
            name = "other"
    assert is_poison(first) and len(first.values) == 1
    assert is_poison(name) and name.values == ("other", "text")


def test_values_that_do_not_merge_raise_at_the_use() -> None:
    with pytest.raises(ScopeError, match=r"`x` .*can't be merged on the two paths"):
        with Trace() as t:
            if t.value(1) > 2:
                x: object = "a"
            else:
                x = [1]
            str(x)


def test_a_deleted_name_raises_after_the_branch() -> None:
    x = 1
    with pytest.raises(ScopeError, match=r"`x` .*one path only"):
        with Trace() as t:
            if t.value(1) > 2:
                del x
            _ = x + 1


def test_rebinding_a_one_path_name_makes_it_usable() -> None:
    with Trace() as t:
        p = t.value(1)
        if p > 2:
            y = 1
        y = p
    assert y == 1


def test_names_first_bound_in_a_loop_and_its_variable_raise_after_it() -> None:
    for use in ("item", "double"):
        with pytest.raises(ScopeError, match=rf"`{use}` .*may run zero times"):
            with Trace() as t:
                for item in t.value([1, 2]):
                    double = item * 2
                _ = item + 1 if use == "item" else double + 1


def test_a_value_that_a_loop_cannot_carry_raises_where_the_body_reads_it() -> None:
    text = "a"
    with pytest.raises(ScopeError, match=r"`text` .*can't go from trip to trip"):
        with Trace() as t:
            for _ in t.value([1, 2]):
                text = text + "b"


def test_a_value_that_a_loop_cannot_carry_and_does_not_change_is_kept() -> None:
    text = "a"
    with Trace() as t:
        for _ in t.value([1, 2]):
            if not t:
                text = "b"
    assert text == "a"


class Place(Value):
    """A proxy whose `+=` changes what it stands for, as that of a site's value does."""

    def __iadd__(self, other: object) -> Value:
        self.recorder.op(operator.iadd, self, other)
        return self

    def __imul__(self, other: object) -> Value:
        return self.recorder.op(operator.mul, self, other)


def place(t: Trace, content: object) -> Any:
    value = Place(t.recorder)
    t.recorder.env[value.id] = content
    return value


def test_changing_a_value_in_place_in_a_loop_or_branch_keeps_the_name_on_it() -> None:
    with Trace() as t:
        h = kept = place(t, [0])
        for item in t.value([[1, 1], [2, 2]]):
            h += item
        if t.value(1) > 0:
            h += (5,)
        same = h is kept
    assert h == [0, 1, 1, 2, 2, 5] and same


def test_an_operator_that_unexpectedly_gives_a_new_value_in_a_loop_is_refused() -> None:
    def block(t: Trace) -> None:
        with t:
            h = place(t, 1)
            for item in t.value([1, 2]):
                h *= item

    refuses(block, "write `h = h + ...`")


def test_a_name_bound_in_a_cond_block_only_raises_after_it() -> None:
    with pytest.raises(ScopeError, match=r"`y` .*one path only of the `with` block"):
        with Trace() as t:
            with t.cond(t.value(1) > 0):
                y = 1
            str(y)


# -- what can't be recorded ----------------------------------------------------------------------------------------------


def refuses(block: Callable[[Trace], None], message: str) -> None:
    """`block` raises inside a trace of its own; the message has this file and a line."""
    with pytest.raises(ControlFlowError, match=r"test_control.py:\d+") as caught:
        block(Trace())
    assert message in str(caught.value)


def test_while() -> None:
    def block(t: Trace) -> None:
        with t:
            while t.value(1) > 0:
                pass

    refuses(block, "`while` over a proxy can't be recorded")


def test_assert() -> None:
    def block(t: Trace) -> None:
        with t:
            assert t.value(1) > 0, "positive"

    refuses(block, "`assert` over a proxy")


@pytest.mark.parametrize("kind", ["list", "set", "dict", "generator", "condition"])
def test_comprehensions(kind: str) -> None:
    def block(t: Trace) -> None:
        with t:
            p = t.value([1])
            if kind == "list":
                _: object = [x for x in p]
            elif kind == "set":
                _ = {x for x in p}
            elif kind == "dict":
                _ = {x: 1 for x in p}
            elif kind == "generator":
                _ = sum(x for x in p)
            else:
                _ = [x for x in range(3) if p]

    refuses(
        block, "a comprehension over a proxy" if kind != "condition" else "the `if` of a comprehension over a proxy"
    )


def test_containment() -> None:
    def item(t: Trace) -> None:
        with t:
            _ = t.value(1) in [1, 2]

    def holder(t: Trace) -> None:
        with t:
            _ = 1 not in t.value([1])

    refuses(item, "`in` over a proxy")
    refuses(holder, "`not in` over a proxy")


def test_chained_comparison() -> None:
    def block(t: Trace) -> None:
        with t:
            _ = 0 < t.value(1) < 2

    refuses(block, "a chained comparison over a proxy")


def test_a_chain_that_ends_in_a_proxy_is_recorded() -> None:
    with Trace() as t:
        x = 0 < 1 < t.value(5)
        y = 2 < 1 < t.value(5)
    assert x is True and y is False


def test_match() -> None:
    def subject(t: Trace) -> None:
        with t:
            match t.value(1):
                case 1:
                    pass

    def guard(t: Trace) -> None:
        with t:
            match 1:
                case _ if t.value(1) > 0:
                    pass

    refuses(subject, "`match` over a proxy")
    refuses(guard, "a `case` guard over a proxy")


def test_for_else() -> None:
    def block(t: Trace) -> None:
        with t:
            for _ in t.value([1]):
                pass
            else:
                pass

    refuses(block, "`else` of a `for` over a proxy")


@pytest.mark.parametrize("keyword", ["break", "continue", "raise"])
def test_leaving_a_recorded_loop(keyword: str) -> None:
    def block(t: Trace) -> None:
        with t:
            for _ in t.value([1]):
                if keyword == "break":
                    break
                if keyword == "continue":
                    continue
                raise KeyError

    refuses(block, f"`{keyword}` inside the `for`")


@pytest.mark.parametrize("keyword", ["break", "continue", "raise"])
def test_leaving_a_recorded_branch(keyword: str) -> None:
    def block(t: Trace) -> None:
        with t:
            for _ in range(3):
                if t.value(1) > 0:
                    if keyword == "break":
                        break
                    if keyword == "continue":
                        continue
                    raise KeyError

    refuses(block, f"`{keyword}` inside the `if`")


def test_leaving_a_cond_block() -> None:
    def block(t: Trace) -> None:
        with t:
            for _ in range(3):
                with t.cond(t.value(1)):
                    break

    refuses(block, "`break` inside the `with` block")


def test_jumps_of_a_plain_loop_inside_a_recorded_branch_are_fine() -> None:
    x = 0
    with Trace() as t:
        if t.value(1) > 0:
            for i in range(10):
                if i == 2:
                    continue
                if i == 4:
                    break
                x = x + i
            try:
                raise KeyError
            except KeyError:
                x = x + 100
    assert x == 104


def test_an_exception_that_leaves_a_recorded_branch_cannot_be_handled_in_the_block() -> None:
    def block(t: Trace) -> None:
        with t:
            try:
                if t.value(1) > 0:
                    int("no number")
            except ValueError:
                pass

    refuses(block, "an exception left the `if`")


def test_an_exception_swallowed_after_it_left_a_recorded_branch_is_found_at_the_end() -> None:
    from contextlib import suppress

    def block(t: Trace) -> None:
        with t:
            with suppress(ValueError):
                if t.value(1) > 0:
                    int("no number")

    refuses(block, "an exception left the `if`")


def test_values_of_a_conditional_expression_have_to_merge() -> None:
    def block(t: Trace) -> None:
        with t:
            _ = "a" if t.value(1) > 0 else [1]

    refuses(block, "the two values of the conditional expression at")


def test_equal_values_of_a_conditional_expression_need_no_merging() -> None:
    with Trace() as t:
        same = "a"
        x = same if t.value(1) > 0 else same  # noqa: RUF034
    assert x == "a"
