"""Which model types Optimum exports and loads with this package.

Optimum may learn a type that we export too. Where the member's record says that it yields, Optimum's own configuration
then stays, until somebody claims the type. `optimum-cli export lfm2` claims the type of its checkpoint.
"""

from __future__ import annotations

from optimum.exporters.tasks import TasksManager

from optimum_lfm2.configs import Lfm2OnnxConfig
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import CLAIMED, MEMBERS
from optimum_lfm2.graph.member import Member
from optimum_lfm2.vision_configs import Lfm2VlOnnxConfig


def register_members() -> None:
    """Register the configuration of each member. One that yields to Optimum's own is no longer `CLAIMED`."""
    for member in MEMBERS:
        if member.yields and optimum_has(member.model_type):
            CLAIMED[:] = [name for name in CLAIMED if name not in member.model_types]
        else:
            _register(member)


def claim(model_type: str) -> None:
    """Export and load a type with this package from now on, even if Optimum has a configuration of its own for it.

    Raises:
        Lfm2Error: this package does not export the type.
    """
    members = [member for member in MEMBERS if model_type in member.model_types]
    if not members:
        raise Lfm2Error(f"This version of optimum-lfm2 does not export the type {model_type}.")
    for member in members:
        if any(name not in CLAIMED for name in member.model_types):
            CLAIMED.extend(name for name in member.model_types if name not in CLAIMED)
            _register(member)


def optimum_has(model_type: str) -> bool:
    """Return whether Optimum has a configuration of its own for the ONNX export of a type."""
    try:
        constructor = TasksManager.get_exporter_config_constructor(
            "onnx", model_type=model_type, task="text-generation", library_name="transformers"
        )
    except (KeyError, ValueError):
        return False
    return not issubclass(constructor.func, Lfm2OnnxConfig)


def _register(member: Member) -> None:
    for name in (member.export_type,) if member.export_type else member.model_types:
        TasksManager.create_register("onnx", overwrite_existing=True)(name, *member.tasks)(
            Lfm2VlOnnxConfig if member.in_parts else Lfm2OnnxConfig
        )
