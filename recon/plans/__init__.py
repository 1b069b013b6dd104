"""Which layers to branch, and what that costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recon.support.lazy import lazy_face

if TYPE_CHECKING:
    from recon.plans.choice import Choice
    from recon.plans.costing.cost_model import CostModel
    from recon.plans.costing.costs import Costs, costs
    from recon.plans.matching import Match, match
    from recon.plans.planning import choose, plan
    from recon.plans.selection import Selection
    from recon.plans.trade_off import frontier

__all__ = ["Choice", "CostModel", "Costs", "Match", "Selection", "choose", "costs", "frontier", "match", "plan"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_face(
        __name__,
        {
            "Choice": "choice",
            "CostModel": "costing.cost_model",
            "Costs": "costing.costs",
            "Match": "matching",
            "Selection": "selection",
            "choose": "planning",
            "costs": "costing.costs",
            "frontier": "trade_off",
            "match": "matching",
            "plan": "planning",
        },
    )
