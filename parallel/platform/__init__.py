"""The machine that the ranks run on: a GPU as core expects it, or a CPU that stands in for one.

`install()` is called once by every process that uses megatron-core, before anything else imports it. It is the
only place in the project that asks whether there is a GPU.
"""

from parallel.platform.install import Platform, current_platform, install

__all__ = ["Platform", "current_platform", "install"]
