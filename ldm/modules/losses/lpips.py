"""The perceptual distance LPIPS, built from weight files that are already on this machine."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from taming.modules.losses import lpips as taming_lpips
from torch import Tensor, nn

LPIPS_FILE = Path("taming/modules/autoencoder/lpips/vgg.pth")
"""Where taming-transformers keeps LPIPS' own weights, from the folder that the program is started in."""

VGG_FILE_NAME = "vgg16-397923af.pth"
"""What torchvision calls its VGG16 weights."""


def vgg_file() -> Path:
    """Name the file that torchvision keeps its VGG16 weights in."""
    return Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE_NAME


class LocalLPIPS(taming_lpips.LPIPS):
    """LPIPS as taming-transformers has it, but for two things: it fetches nothing, and it stays in evaluation.

    It has dropout, which would make the distance between two pictures a random number during training.
    On the ``meta`` device, which holds no values, no file is read.

    Raises:
        OSError: a file of weights is missing; the message names each and its source.
        ValueError: a file holds something else.

    Reference:
        Zhang et al. 2018, arXiv 1801.03924, eq. 1.
    """

    def __init__(self) -> None:
        # taming's own constructor fetches weights, so its parts are put together here.
        nn.Module.__init__(self)
        self.scaling_layer = taming_lpips.ScalingLayer()
        self.chns = [64, 128, 256, 512, 512]
        for index, channels in enumerate(self.chns):
            setattr(self, f"lin{index}", taming_lpips.NetLinLayer(channels, use_dropout=True))
        with warnings.catch_warnings(), torch.device("meta"):
            # taming calls torchvision in the words of 2021. On meta, as all of VGG would be initialised for its half.
            warnings.simplefilter("ignore", UserWarning)
            self.net = taming_lpips.vgg16(pretrained=False)
        if not next(self.lin0.parameters()).is_meta:
            _check_files(LPIPS_FILE, vgg_file())
            self._load(LPIPS_FILE, vgg_file())
        self.requires_grad_(False)
        self.eval()

    def _load(self, lpips: Path, vgg: Path) -> None:
        """Fill in the weights: VGG16's features from torchvision's file, the rest from taming's."""
        features = _read(vgg)
        names = {key: "features." + key.partition(".")[2] for key in self.net.state_dict()}
        _check_keys(vgg, names.values(), features)
        self.net.load_state_dict({key: features[name].float() for key, name in names.items()}, assign=True)
        linear = _read(lpips)
        wanted = [f"lin{index}.model.1.weight" for index in range(len(self.chns))]
        _check_keys(lpips, wanted, linear)
        for key in wanted:
            self.get_parameter(key).data.copy_(linear[key])

    def train(self, mode: bool = True) -> LocalLPIPS:
        """Stay in evaluation, whatever the model around it does."""
        return super().train(False)


def _check_files(lpips: Path, vgg: Path) -> None:
    sources = {
        lpips: "vgg.pth of taming-transformers, the LPIPS weights for VGG",
        vgg: "torchvision's VGG16 weights, https://download.pytorch.org/models/" + VGG_FILE_NAME,
    }
    missing = [f"{path.absolute()} ({source})" for path, source in sources.items() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            "perceptual_weight above 0 needs the weights of LPIPS, and this trainer fetches nothing: put there "
            f"{' and '.join(missing)}; or set perceptual_weight: 0 in lossconfig.params"
        )


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged or no file of weights; get it again") from error
    if not isinstance(weights, Mapping):
        raise ValueError(f"{path} holds a {type(weights).__name__}, not a dictionary of weights; get it again")
    return weights


def _check_keys(path: Path, wanted: Iterable[str], weights: Mapping[str, Tensor]) -> None:
    missing = [key for key in wanted if key not in weights]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weights ({missing[0]}…); it is another file than its name says")
