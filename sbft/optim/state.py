"""The part of an optimizer that is saved, loaded and pickled: its averages, settings, seed and clock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sbft.optim.sharding import cut_like, shard_of, whole

CLOCK = "clock"  # key in a parameter group; in older saved states, key of the state itself


@dataclass
class TokenClock:
    """Progress of an optimizer: finished steps, the tokens in them, and skipped steps."""

    steps: int = 0
    tokens_seen: int = 0
    skipped_steps: int = 0


class SavedState(torch.optim.Optimizer):
    """The state of an optimizer: averages that are float32 whatever the weights are, and a clock that is saved with them."""

    seed: int
    clock: TokenClock
    _tokens_per_step: int | None
    _positions: dict[Tensor, tuple[int, int]]  # a parameter's group, and its place among all parameters
    replacements: int
    """How often the tensors of the state were replaced, or parameters added: after that, stored addresses are outdated."""

    def state_dict(self) -> dict[str, Any]:
        """As in torch; the state of a sharded parameter is the local part, as DTensors.

        Every group holds under "clock" the clock, the seed and the class's name: groups are the only place where
        `torch.distributed.checkpoint` keeps values that belong to no parameter.
        """
        self._note_clock()
        return super().state_dict()

    def _note_clock(self) -> None:
        noted = self._noted_clock()
        for group in self.param_groups:
            group[CLOCK] = noted

    def _noted_clock(self) -> dict[str, Any]:
        """A new dict each time: states that were saved earlier hold the former ones."""
        clock = self.clock
        return {
            "steps": clock.steps,
            "tokens_seen": clock.tokens_seen,
            "skipped_steps": clock.skipped_steps,
            "seed": self.seed,
            "optimizer": type(self).__name__,
        }

    @torch.no_grad()
    def whole_state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """`state_dict()` with every tensor whole and on the CPU, for any number of ranks to load.

        All ranks have to call it; those with `keep=False` get no tensors.
        """
        saved = self.state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        for i, of_parameter in saved["state"].items():
            for name, value in of_parameter.items():
                gathered = whole(value)
                if keep:
                    state.setdefault(i, {})[name] = gathered.cpu()
        return {**saved, "state": state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the state is float32 (torch casts it to the dtype of bfloat16 weights).

        A state of whole tensors is sharded like the parameters.

        Raises:
            ValueError: if the state comes from another kind of optimizer, or its groups do not fit.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        clock = saved_clock(state_dict)
        own_name = type(self).__name__
        if clock is None:
            raise ValueError(
                "this state has no token clock, so it was not saved by an sbft optimizer, and its averages are per step: to "
                f"continue with {own_name}, do not load it; its averages then start from zero"
            )
        saved_by = clock.pop("optimizer", own_name)  # not in older states
        if saved_by != own_name:
            raise ValueError(
                f"this state was saved by {saved_by}, whose settings and averages are not those of {own_name}"
            )
        with self._without_load_hooks():  # torch would hand them the state cast to the weights' dtype
            super().load_state_dict({**state_dict, "state": {}})
        self.seed = clock.pop("seed")
        self.clock = TokenClock(**clock)
        params = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        self.state.clear()
        self.replacements += 1
        for i, param in zip(ids, params, strict=True):
            saved = state_dict["state"].get(i)
            if saved is not None:
                values = {name: value.to(param.device, torch.float32, copy=True) for name, value in saved.items()}
                self.state[param] = self._cut(values, param) if shard_of(param) is not None else values
        self._note_clock()
        self._begin_step()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @contextmanager
    def _without_load_hooks(self) -> Iterator[None]:
        hooks = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        try:
            yield
        finally:
            self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks = hooks

    def new_state(self, param: Tensor) -> dict[str, Tensor]:
        """The state that a parameter's first update would make, for example to read a saved one into."""
        tokens, self._tokens_per_step = self._tokens_per_step, 1
        state: dict[str, Tensor] = {}
        self._init_state(param, self.param_groups[self._positions[param][0]], state)
        self._tokens_per_step = tokens
        return state

    def _cut(self, state: dict[str, Tensor], param: Tensor) -> dict[str, Tensor]:
        """The state of a sharded parameter, sharded like a new one."""
        new = self.new_state(param)
        return {name: cut_like(value, new[name]) if name in new else value for name, value in state.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "seed": self.seed, "clock": self.clock}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_positions" in self.__dict__:  # called by load_state_dict, not to unpickle
            return
        self._start_transient()
        params = [(g, p) for g, group in enumerate(self.param_groups) for p in group["params"]]
        self._positions = {p: (g, i) for i, (g, p) in enumerate(params)}

    def _start_transient(self) -> None:
        """Set everything that is neither saved nor pickled."""
        self._tokens_per_step = None
        self._positions = {}
        self.replacements = 0

    def _begin_step(self) -> None:
        raise NotImplementedError  # abstract

    def _init_state(self, param: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        raise NotImplementedError  # abstract


def saved_clock(state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """A copy of the clock, seed and optimizer's name in a saved state; None if sbft did not save it."""
    if CLOCK in state_dict:  # saved by an older version, which kept it outside the groups
        named = {"optimizer": state_dict["optimizer"]} if "optimizer" in state_dict else {}
        return {**state_dict[CLOCK], **named}
    return next((dict(group[CLOCK]) for group in state_dict["param_groups"] if CLOCK in group), None)
