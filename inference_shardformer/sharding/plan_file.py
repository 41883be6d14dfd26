"""PlanFile: the plans of all ranks as a file that is read, compared by lines, and loaded from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from inference_shardformer.config.model import ModelFacts
from inference_shardformer.errors import PlanFileError
from inference_shardformer.sharding.plan import ModulePlan, ParameterPlan, ShardingPlan, SourceSlice, TensorInfo
from inference_shardformer.sharding.plan_check import check_arrangement, check_consistency
from inference_shardformer.sharding.plan_document import (
    REMAKE,
    ParameterEntry,
    PlanDocument,
    RankPart,
    parse_document,
)

_FACTS = (  # what slices follow from; other facts may be added without making old files useless
    "architecture",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "total_num_heads",
    "total_num_kv_heads",
    "head_dim",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class PlanFile:
    """The plans of every rank, with the facts and the checkpoint tensors that they were made from.

    `name` is what errors call it. Only `plans_for` says whether it fits a model.
    """

    document: PlanDocument
    name: str = "the plan"

    @classmethod
    def of(cls, plans: Sequence[ShardingPlan], tensors: Mapping[str, TensorInfo], *, policy: str) -> PlanFile:
        """The file of one plan for each rank; `tensors` are those of the unsharded model."""
        first = plans[0]
        model, shapes = facts_of_plan(first.facts), shapes_used(plans, tensors)
        document = PlanDocument(
            fingerprint=fingerprint(model, shapes),
            policy=policy,
            tp_size=len(plans),
            vocab_ranges=tuple(plan.vocab_range for plan in plans),
            model=model,
            replaced=dict(first.replaced),
            modules={module.path: (module.row, module.style, module.tied_to) for module in first.modules},
            tensors=shapes,
            parameters={
                parameter.name: ParameterEntry(
                    module=module.path,
                    ranks=tuple(_part(plan.modules[place].parameters[number]) for plan in plans),
                )
                for place, module in enumerate(first.modules)
                for number, parameter in enumerate(module.parameters)
            },
        )
        return cls(document)

    @classmethod
    def read(cls, path: str | Path) -> PlanFile:
        """Read a file. Raises `PlanFileError` for what is no plan, has another version, or lost its shape."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise PlanFileError(f"plan file {path}: cannot be read: {exc}", remedy="check the path") from exc
        name = f"plan file {path}"
        return cls(parse_document(text, name), name)

    def write(self, path: str | Path) -> None:
        """Write the text to a file. Raises `PlanFileError` if that is impossible."""
        try:
            Path(path).write_text(self.document.to_text(), encoding="utf-8")
        except OSError as exc:
            raise PlanFileError(f"plan file {path}: cannot be written: {exc}", remedy="give another path") from exc

    def plans_for(
        self, plans: Sequence[ShardingPlan], tensors: Mapping[str, TensorInfo], *, policy: str
    ) -> list[ShardingPlan]:
        """The plans of the file, for a model whose own plans are `plans`, one for each rank.

        Raises `PlanFileError` for a file made for another model, policy or number of ranks, for one that is not
        consistent, and for one that puts a block's parts together in a way that the modules do not compute.
        """
        self._check_identity(plans, tensors, policy)
        check_consistency(self.document, plans, self.name)
        check_arrangement(self.document, plans, self.name)
        return [replace(plan, modules=self._modules(plan)) for plan in plans]

    def _modules(self, plan: ShardingPlan) -> tuple[ModulePlan, ...]:
        rank = plan.layout.tp_rank
        return tuple(
            replace(module, parameters=tuple(self._parameter(each.name, rank) for each in module.parameters))
            for module in plan.modules
        )

    def _parameter(self, name: str, rank: int) -> ParameterPlan:
        part = self.document.parameters[name].ranks[rank]
        return ParameterPlan(name, part.shape, tuple(SourceSlice(*each) for each in part.slices))

    def _check_identity(self, plans: Sequence[ShardingPlan], tensors: Mapping[str, TensorInfo], policy: str) -> None:
        document = self.document
        if document.fingerprint != fingerprint(document.model, document.tensors):
            self._refuse("its model or its tensors were edited: they do not belong to its fingerprint")
        model, shapes = facts_of_plan(plans[0].facts), shapes_used(plans, tensors)
        wrong = [*_differences(document.model, model), *_differences(document.tensors, shapes)]
        if wrong:
            self._refuse(f"was made for another model: {'; '.join(wrong[:3])}", "plan this model, or load the other")
        if document.tp_size != len(plans):
            self._refuse(
                f"was made for tp_size {document.tp_size}, and the model is loaded on {len(plans)} rank(s)",
                f"start {document.tp_size} ranks, or plan for {len(plans)}",
            )
        if document.policy != policy:
            self._refuse(f"was made by {document.policy}, and the model is sharded by {policy}")

    def _refuse(self, problem: str, remedy: str = REMAKE) -> None:
        raise PlanFileError(f"{self.name}: {problem}", remedy=remedy)


def facts_of_plan(facts: ModelFacts) -> dict[str, int | str | bool]:
    """The facts that slices follow from."""
    return {name: getattr(facts, name) for name in _FACTS}


def shapes_used(plans: Sequence[ShardingPlan], tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint tensors that plans take slices of."""
    used = {part.tensor for plan in plans for parameter in plan.parameters for part in parameter.slices}
    return {name: info.shape for name, info in tensors.items() if name in used}


def fingerprint(model: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What must be equal for a plan to fit, in short: the facts, and the names and shapes of the tensors."""
    told = json.dumps([dict(model), sorted((name, list(shape)) for name, shape in shapes.items())], sort_keys=True)
    return f"sha256:{sha256(told.encode()).hexdigest()}"


def _part(parameter: ParameterPlan) -> RankPart:
    return RankPart(shape=parameter.shape, slices=tuple(tuple(part) for part in parameter.slices))  # type: ignore[misc]


def _differences(planned: Mapping[str, object], given: Mapping[str, object]) -> list[str]:
    """What differs, one sentence for each name."""
    return [
        f"{name} is {_shown(planned, name)} in the plan and {_shown(given, name)} in the model"
        for name in dict.fromkeys((*planned, *given))
        if planned.get(name) != given.get(name)
    ]


def _shown(values: Mapping[str, object], name: str) -> str:
    value = values.get(name, "absent")
    return str(list(value) if isinstance(value, tuple) else value)
