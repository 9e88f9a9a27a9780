"""What a replica has room for, and the card by which a policy knows each candidate.

Both hosts build their memory pools and the policy's candidates from here: the simulator and the
real backend must see the same limits and the same predictions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from helios_sim import cost
from helios_sim.errors import InputError, did_you_mean
from helios_sim.model import kv_pool_blocks
from helios_sim.policy.contract import Candidate, Policy, Slo
from helios_sim.profile import Profile
from helios_sim.profiles.files import load_profile, where_to_find, with_assumptions
from helios_sim.scenario import EXPECTED_LENGTHS, FleetSettings, Scenario, ServingSettings
from helios_sim.settings.slo import SloSpec
from helios_sim.workload.requests import Requests


@dataclass(frozen=True, kw_only=True)
class Room:
    """The memory of one replica, and what of it is left beside the weights."""

    profile: Profile
    candidates: tuple[str, ...]
    fleet: FleetSettings
    serving: ServingSettings

    @property
    def memory_bytes(self) -> int:
        """Memory of the GPUs of one replica."""
        return self.fleet.memory_bytes or self.profile.device.memory_bytes

    @property
    def usable_bytes(self) -> int:
        """Bytes for weights, workspace and KV; below 0 where the reserve is more than all."""
        utilised = int(self.memory_bytes * self.fleet.memory_utilisation)
        return utilised - self.fleet.reserve_bytes

    @property
    def expected_prompt_tokens(self) -> int:
        """The prompt that a policy reckons with."""
        tokens = self.serving.expected_prompt_tokens
        assert tokens is not None, "A room is asked once its scenario expects lengths."
        return tokens

    @property
    def expected_output_tokens(self) -> int:
        """The output that a policy reckons with."""
        tokens = self.serving.expected_output_tokens
        assert tokens is not None, "A room is asked once its scenario expects lengths."
        return tokens

    @property
    def typical_tokens(self) -> int:
        """Tokens of a request of the expected lengths."""
        return self.expected_prompt_tokens + self.expected_output_tokens

    @property
    def context_tokens(self) -> int:
        """The shortest context among the candidates: a request may be served by any of them."""
        return min(self.profile.model(name).model.shape.max_positions for name in self.candidates)

    def pool_blocks(self, name: str, depth: int) -> int:
        """KV blocks beside the weights of a model loaded to `depth` layers."""
        model = self.profile.model(name)
        return kv_pool_blocks(
            self.usable_bytes,
            model.model.weight_bytes(depth),
            model.workspace_bytes,
            self.block_bytes(name, depth),
        )

    def block_bytes(self, name: str, depth: int) -> int:
        """Bytes of one KV block over the loaded layers."""
        return self.serving.block_tokens * self.profile.model(name).model.kv_bytes_per_token(depth)

    def requests_that_fit(self, name: str, depth: int, tokens_per_request: float) -> float:
        """Requests of a length whose KV fits beside the weights, whatever the batch setting."""
        blocks = math.ceil(tokens_per_request / self.serving.block_tokens)
        return self.pool_blocks(name, depth) / max(1, blocks)

    def longest_request(self, name: str, depth: int) -> int:
        """Tokens of the longest request that a model loaded to `depth` layers ever takes."""
        positions = self.profile.model(name).model.shape.max_positions
        # The last token of a request is emitted and enters no cache.
        return min(positions, self.pool_blocks(name, depth) * self.serving.block_tokens + 1)

    @property
    def longest_requests(self) -> tuple[int, int]:
        """The least and the most that `longest_request` is, over what a policy may choose."""
        longest = [
            self.longest_request(name, depth)
            for name in self.candidates
            for depth in self.profile.model(name).model.exit_layers
            if self.needed_bytes(name, depth) <= self.usable_bytes
        ]
        return min(longest), max(longest)

    def needed_bytes(self, name: str, depth: int) -> int:
        """Bytes that a model loaded to `depth` layers needs for one request of typical length."""
        model = self.profile.model(name)
        blocks = math.ceil(self.typical_tokens / self.serving.block_tokens)
        weights = model.model.weight_bytes(depth)
        return weights + model.workspace_bytes + blocks * self.block_bytes(name, depth)

    def shortage(self, name: str, depth: int) -> str:
        """Why a model loaded to `depth` layers does not fit, as a clause: needed and there."""
        fleet = self.fleet
        whose = "fleet.memory_bytes" if fleet.memory_bytes else "the device's memory,"
        reserve = f", less reserve_bytes {fleet.reserve_bytes:,}" if fleet.reserve_bytes else ""
        return (
            f"weights, workspace and one request of {self.typical_tokens:,} tokens need "
            f"{self.needed_bytes(name, depth):,} bytes, and there are "
            f"{max(0, self.usable_bytes):,} ({whose} {self.memory_bytes:,} "
            f"at memory_utilisation {fleet.memory_utilisation:g}{reserve})"
        )

    def no_room(self, name: str, depth: int) -> InputError:
        """The error for weights that leave no room for KV."""
        layers = self.profile.model(name).model.shape.layers
        return InputError(
            f"Model {name!r} with {depth} of {layers} layers does not fit: "
            f"{self.shortage(name, depth)}; choose a smaller model, a shallower depth or more "
            "memory.",
            "fleet",
        )


def room_of(scenario: Scenario, base_dir: Path, where: str = "scenario") -> Room:
    """Read the profile that a scenario names and check that it has the scenario's candidates."""
    fleet = scenario.fleet
    try:
        profile = load_profile(fleet.profile, base_dir)
    except InputError as error:
        raise error.at(f"{where}, fleet.profile, {error.where}") from error
    if fleet.assume:
        try:
            profile = with_assumptions(profile, fleet.assume)
        except InputError as error:
            raise error.at(f"{where}, fleet.{error.where}") from error
    candidates = fleet.candidates or tuple(profile.models)
    for index, name in enumerate(candidates):
        if name not in profile.models:
            hint = did_you_mean(name, profile.models)
            raise InputError(
                f"Profile {profile.name!r} has no model {name!r}.{hint} It has "
                f"{', '.join(profile.models)}.{where_to_find(name, fleet.profile)}",
                f"{where}, fleet.candidates.{index}",
            )
    if len(set(candidates)) != len(candidates):
        raise InputError("A candidate is named twice.", f"{where}, fleet.candidates")
    return Room(profile=profile, candidates=candidates, fleet=fleet, serving=scenario.serving)


def expecting(serving: ServingSettings, requests: Requests, context_tokens: int) -> ServingSettings:
    """Settings whose unset expected lengths are the requests' means, to whole tokens.

    So much an operator knows of the traffic; it says nothing of any one request. Requests beyond
    the context are served by nobody and left out, as long as there are others.
    """
    columns = (requests.prompt_tokens, requests.output_tokens)
    served = columns[0].astype(np.int64) + columns[1] <= context_tokens
    if not served.any():
        served[:] = True
    unset = {
        key: round(float(tokens[served].mean()))
        for key, tokens in zip(EXPECTED_LENGTHS, columns, strict=True)
        if getattr(serving, key) is None
    }
    return serving.model_copy(update=unset)


def check_room(room: Room, where: str) -> None:
    """Raise `InputError` where no candidate, however shallow, can serve a typical request."""
    smallest = min(
        ((name, room.profile.model(name).model.exit_layers[0]) for name in room.candidates),
        key=lambda place: room.needed_bytes(*place),
    )
    needed, fleet = room.needed_bytes(*smallest), room.fleet
    if needed <= room.usable_bytes:
        return
    without_reserve = room.usable_bytes + fleet.reserve_bytes
    if needed <= without_reserve:
        key, enough = "reserve_bytes", f"at most {without_reserve - needed:,}"
    else:
        utilised = needed + fleet.reserve_bytes
        total = math.ceil(utilised / fleet.memory_utilisation)
        if int(total * fleet.memory_utilisation) < utilised:  # by a rounding
            total += 1
        key, enough = "memory_bytes", f"at least {total:,}"
    mend = f"give fleet.{key} of {enough}"
    if key == "memory_bytes" and fleet.memory_bytes is None:
        key, mend = "profile", f"name a smaller candidate or a device of {enough} bytes"
    name, depth = smallest
    raise InputError(
        f"No candidate fits at any exit, not even {name!r} at depth {depth}: "
        f"{room.shortage(name, depth)}; {mend}.",
        f"{where}, fleet.{key}",
    )


def policy_slo(spec: SloSpec | None) -> Slo:
    """The limits that bound a shortlist."""
    if spec is None:
        return Slo()
    return Slo(
        ttft_s=spec.limit_s("ttft"),
        tpot_s=spec.limit_s("tpot"),
        e2e_s=spec.limit_s("e2e"),
        itl_s=spec.limit_s("itl"),
    )


def candidate_card(room: Room, name: str) -> Candidate:
    """What a policy may know of a model before it serves: bytes, limits and predicted costs."""
    profile = room.profile.model(name)
    model = profile.model
    prompt, tokens = room.expected_prompt_tokens, room.typical_tokens
    c = profile.coefficient_array()
    limits = tuple(int(room.requests_that_fit(name, depth, tokens)) for depth in model.exit_layers)
    has_energy = room.profile.has_energy
    batches = card_batches(limits, room.serving.max_batch)
    ending = [_typical_decodes(room, name, depth, batches, depth, 0) for depth in model.exit_layers]
    exiting = [
        _typical_decodes(room, name, depth, batches, model.exit_layers[-1], level)
        for level, depth in enumerate(model.exit_layers)
    ]
    pairs = prompt * (prompt + 1) / 2
    prefill_s = [
        cost.mixed_seconds(
            c, 0.0, 0.0, 0.0, float(prompt), 0.0, pairs, float(depth), 0.0, 1.0, 1.0, 1.0
        )[0]
        for depth in model.exit_layers
    ]
    return Candidate(
        name=name,
        tokenizer=model.tokenizer,
        exit_layers=model.exit_layers,
        weight_bytes=tuple(model.weight_bytes(depth) for depth in model.exit_layers),
        kv_bytes_per_token=tuple(model.kv_bytes_per_token(depth) for depth in model.exit_layers),
        batch_limit=limits,
        batches=batches,
        decode_iteration_s=tuple(seconds for seconds, _ in ending),
        decode_iteration_j=tuple(joules for _, joules in ending) if has_energy else None,
        exiting_iteration_s=tuple(seconds for seconds, _ in exiting),
        exiting_iteration_j=tuple(joules for _, joules in exiting) if has_energy else None,
        prefill_s=tuple(map(float, prefill_s)),
        reference_batch=reference_batch(room.serving.max_batch),
        typical_tokens=tokens,
        typical_output_tokens=room.expected_output_tokens,
    )


def confidence_thresholds(room: Room, policy: Policy) -> dict[str, float]:
    """The confidence at which tokens of each candidate leave under a policy."""
    chosen = policy.confidence_threshold
    return {
        name: room.profile.model(name).confidence.default_threshold if chosen is None else chosen
        for name in room.candidates
    }


def reference_batch(max_batch: int) -> int:
    """The rows of a replica with little to do: about as many as an evaluation sees."""
    return min(max_batch, 4)


def card_batches(limits: tuple[int, ...], max_batch: int) -> tuple[int, ...]:
    """The batches a card knows: the reference, powers of two, and what each depth runs at most."""
    most = [min(limit, max_batch) for limit in limits if limit >= 1]
    largest = max(most, default=1)
    powers = [2**power for power in range(largest.bit_length())]
    return tuple(sorted({reference_batch(max_batch), *powers, *most}))


def _typical_decodes(
    room: Room, name: str, depth: int, batches: tuple[int, ...], loaded: int, num_before: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds and joules of decode iterations of so many requests of the typical length each.

    All rows leave at `depth` of `loaded` layers, asked at the `num_before` exits before it.
    """
    profile = room.profile.model(name)
    c = profile.coefficient_array()
    padded = profile.padded_rows(batches[-1])
    residual = profile.residual(batches[-1], loaded)
    # An exit before the loaded depth is asked by a check, the loaded depth by its head.
    is_end = depth == loaded
    checks, heads = float(num_before + (not is_end)), float(is_end)
    filled = 0.0 if room.serving.skipped_kv == "recomputed" else float(loaded - depth)
    # Rows of one typical length, so that padding reads no more than the rows computed.
    row_context = room.expected_prompt_tokens + room.expected_output_tokens / 2
    seconds, joules = [], []
    for batch in batches:
        rows = float(padded[batch])
        context = (batch * row_context, rows * row_context)
        work = (rows, *context, float(depth), checks, heads, filled, rows)
        one_s, _ = cost.decode_seconds(c, *work, float(batch), float(residual[batch]))
        seconds.append(float(one_s))
        joules.append(float(cost.decode_joules(c, *work, one_s)))
    return tuple(seconds), tuple(joules)
