"""All rules on one text: Gopher's, quality first since it is cheap on any length; C4's; FineWeb's."""

from __future__ import annotations

from data.clean.rules import c4, fineweb, gopher
from data.clean.rules.settings import RuleSettings
from data.clean.rules.text import Text


class Rules:
    """Applies the groups of rules that are asked for."""

    def __init__(self, settings: RuleSettings) -> None:
        self._settings = settings

    def verdict(self, text: str) -> tuple[str, str | None, float | None]:
        """Judge a text that is not empty.

        Returns:
            The text as it goes on (C4 drops lines), the rule that removes it or None, and what that rule saw.
        """
        whole, found = self._apply(Text(text))
        return (whole.text, None, None) if found is None else (whole.text, found[0], round(found[1], 4))

    def _apply(self, text: Text) -> tuple[Text, gopher.Found]:
        found: gopher.Found = None
        if self._settings.gopher is not None:
            found = gopher.quality(text, self._settings.gopher) or gopher.repetition(text, self._settings.gopher)
        if found is None and self._settings.c4 is not None:
            text, found = c4.apply(text, self._settings.c4)
        if found is None and self._settings.fineweb is not None:
            found = fineweb.apply(text, self._settings.fineweb)
        return text, found
