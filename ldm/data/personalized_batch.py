"""The name under which older YAML files ask for the training set."""

from ldm.data.every_dream import EveryDreamBatch

PersonalizeBatchBase = EveryDreamBatch
