"""The name under which older YAML files ask for the validation set."""

from ldm.data.ed_validate import EDValidateBatch

PersonalizedBase = EDValidateBatch
