"""axolotl's `optimizer: tam`, by one line in its YAML. Imports axolotl.

plugins:
  - hf_momentum.integrations.axolotl.HFMomentumPlugin
optimizer: tam
optim_args: gamma=0.95
"""

from typing import Any

from axolotl.integrations.base import BasePlugin

from hf_momentum.errors import InputError, nearest
from hf_momentum.integrations.registry import OPTIMIZERS


class HFMomentumPlugin(BasePlugin):  # type: ignore[misc]
    """Makes our names known, by being imported, before axolotl reads its configuration.

    axolotl's groups, schedule and clipping stay as they are; `optim_args` is a mapping, or text as for `--optim_args`.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        """Look at the configuration as it was written.

        Raises:
            InputError: `optimizer` is none of our names, so that this plugin would do nothing.
        """
        name = str(cfg.get("optimizer"))
        if name not in OPTIMIZERS:
            raise InputError(
                f"optimizer is {name!r}, which is not hf-momentum's{nearest(name, OPTIMIZERS)}: name one of "
                f"{', '.join(OPTIMIZERS)}, or take the plugin out"
            )
