"""
Detectors through torch.hub; an entry for each row of docs/zoo.md.

  detect = torch.hub.load(REPO, 'detector', 'detr_resnet50')
  objects = detect('image.jpg')            # [{'name': 'dog', 'score': 0.98, 'box': [x0, y0, x1, y1]}, ...]

  model, postprocess = torch.hub.load(REPO, 'detr_resnet50', pretrained=True, return_postprocessor=True)
  detections = postprocess(model.eval()(images), target_sizes)

Each entry takes the arguments of `models.hub.build`.

Other projects also have packages named `datasets`, `models` and `util`. Those of this folder are therefore
imported as parts of a package with a unique name: `detr_1a2b3c4d.models.hub`, for example.
"""

import re as _re
import sys as _sys
from importlib import import_module as _import_module
from importlib.machinery import ModuleSpec as _ModuleSpec
from importlib.machinery import PathFinder as _PathFinder
from importlib.machinery import SourceFileLoader as _SourceFileLoader
from pathlib import Path as _Path
from types import CodeType as _CodeType
from types import ModuleType as _ModuleType
from zlib import crc32 as _crc32

dependencies = ['torch', 'torchvision', 'numpy', 'PIL']

_ROOT = str(_Path(__file__).resolve().parent)
_PACKAGE = f'detr_{_crc32(_ROOT.encode()):08x}'  # every copy of this folder has its own
_RENAMED = rb'\1%s.\2' % _PACKAGE.encode()


class _Loader(_SourceFileLoader):
    """Loader of a file of this folder, whose imports from these packages stay in this folder."""

    def get_code(self, fullname: str) -> _CodeType:
        """Compile the file with changed imports; cached bytecode has the original ones and is not used."""
        source = _re.sub(rb'(?m)^( *from )(datasets|models|util)\b', _RENAMED, self.get_data(self.path))
        return self.source_to_code(source, self.path)


class _Finder:
    """Finder of the modules of this package alone."""

    @staticmethod
    def find_spec(name: str, path: list[str] | None, target: object = None) -> _ModuleSpec | None:
        if not name.startswith(f'{_PACKAGE}.'):
            return None
        spec = _PathFinder.find_spec(name, path)
        if spec:
            spec.loader = _Loader(name, spec.origin)
        return spec


if _PACKAGE not in _sys.modules:
    _sys.modules[_PACKAGE] = _ModuleType(_PACKAGE)
    _sys.modules[_PACKAGE].__path__ = [_ROOT]
    _sys.meta_path.insert(0, _Finder)
globals().update(_import_module(f'{_PACKAGE}.models.hub').entries())
