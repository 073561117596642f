"""Pictures with class labels: each subfolder is a class."""

from __future__ import annotations

from typing import Any

from ldm.data.every_dream import EveryDreamBatch


class ClassFolders(EveryDreamBatch):
    """The pictures of :class:`EveryDreamBatch`, labelled by their subfolder, for class-conditional models.

    Takes the same arguments. Items also hold ``class_label``: the subfolder's number in alphabetical order.

    Attributes:
        classes: the subfolders' names, in the order of their labels.
    """

    @property
    def classes(self) -> list[str]:
        """The subfolders' names, in the order of their labels."""
        return sorted(self.folder_counts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one exposure; see :meth:`EveryDreamBatch.__getitem__`."""
        _, _, picture = self.locate(index)
        return {**super().__getitem__(index), "class_label": self.classes.index(picture.folder)}
