"""Names of images that come from another machine or tool: which file below the folder they mean."""

from pathlib import Path

import pytest

from datasets.coco_json import Issues
from datasets.image_names import find_images
from util.errors import FileError, UserError


def folder(tmp_path: Path, files: str) -> Path:
    for name in files.split('|'):
        path = tmp_path / 'set' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'')
    return tmp_path / 'set'


# Files below the folder, names in the annotations, and the files that they mean, all separated by '|'.
FOUND = {
    'separators of Windows': ('p1.jpg|90.jpg', r'images\p1.jpg|images\1/90.jpg', 'p1.jpg|90.jpg'),
    'the longest tail': ('1/a.jpg|2/a.jpg|a.jpg', r'set\1\a.jpg|set\2\a.jpg|set\a.jpg', '1/a.jpg|2/a.jpg|a.jpg'),
    'above the folder': ('12.jpg|13.jpg', r'..\label\12.jpg|../label/13.jpg', '12.jpg|13.jpg'),
    'a drive': ('a/p.jpg', r'C:\Users\me\a\p.jpg', 'a/p.jpg'),
    'another machine': ('p1.jpg|p2.jpg', '/home/me/x/p1.jpg|/home/me/y/p2.jpg', 'p1.jpg|p2.jpg'),
    'a folder that was flattened': ('1.jpg|2.jpg', 'a/1.jpg|b/2.jpg', '1.jpg|2.jpg'),
    'deeper than named': ('images/default/1.jpg|images/default/2.jpg', '1.jpg|2.jpg', 'images/default/1.jpg|images/default/2.jpg'),
    'local files of label-studio': ('p1.jpg|s/p2.jpg', '/data/local-files/?d=set/p1.jpg|/data/local-files/?d=set%2Fs%5Cp2.jpg', 'p1.jpg|s/p2.jpg'),
    'uploads of label-studio': ('p1.jpg|942a1b2d-p2.jpg', 'upload/1/942a1b2c-p1.jpg|/data/upload/1/942a1b2d-p2.jpg', 'p1.jpg|942a1b2d-p2.jpg'),
    'uploads with spaces': ('my photo.jpg', 'images/942a1b2c-my_photo.jpg', 'my photo.jpg'),
    'URLs': ('a/1.jpg|2.jpg', 's3://bucket/a/1.jpg|https://host/x/2.jpg?X-Amz-Date=1&d_=3', 'a/1.jpg|2.jpg'),
    'a URL of a file': ('1.jpg', 'file:///C:/set/1.jpg', '1.jpg'),
    'percent': ('my photo.jpg|100%25.jpg', 'x/my%20photo.jpg|x/100%25.jpg', 'my photo.jpg|100%25.jpg'),
    'other letters': ('A.JPG|gr\u00fcn.png', 'a.jpg|gru\u0308n.png', 'A.JPG|gr\u00fcn.png'),
    'of the same letters first': ('x/A.jpg|y/a.jpg', 'z/a.jpg|z/A.jpg', 'y/a.jpg|x/A.jpg'),
    'some stand': ('1.jpg|sub/2.jpg', r'1.jpg|D:\sub\2.jpg', '1.jpg|sub/2.jpg'),
    'points in the way': ('a/1.jpg', r'a/./b/../1.jpg|.\a\1.jpg', 'a/1.jpg|a/1.jpg'),
    'the same image twice': ('1.jpg', r'x\1.jpg|x/1.jpg', '1.jpg|1.jpg'),
    'hidden copies': ('1.jpg|.cache/x/1.jpg|._1.jpg', 'x/1.jpg', '1.jpg'),
}  # fmt: skip


@pytest.mark.parametrize('case', FOUND)
def test_names_that_mean_a_file(case: str, tmp_path: Path) -> None:
    files, names, expected = FOUND[case]
    issues, given = Issues(), names.split('|')
    assert find_images(given, folder(tmp_path, files), 'a.json', issues=issues) == expected.split('|')
    changed = {name for name, found in zip(given, expected.split('|'), strict=True) if name != found}
    assert dict(issues.counts) == {'image names found by their last parts': len(changed)}


REFUSED = {
    'two files': ('a/1.jpg|b/1.jpg', r'x\1.jpg', r"'x\\\\1.jpg' fits a/1.jpg, b/1.jpg"),
    'two names': ('1.jpg', r'x\1.jpg|y\1.jpg', r"'x\\\\1.jpg' and 'y\\\\1.jpg' both fit 1.jpg"),
    'two uploads': ('1.jpg', 'aaaa1111-1.jpg|bbbb2222-1.jpg', 'both fit 1.jpg'),
    'a name that stands': ('1.jpg', r'1.jpg|C:\1.jpg|C:\x\1.jpg', "'1.jpg' and .* both fit 1.jpg"),
    'missing': ('1.jpg', r'x\2.jpg|x\1.jpg', r'1 of 2 images of a.json are not in .*set, the first is x\\2.jpg'),
    'missing among others': ('a/1.jpg|a/2.jpg', 'a/1.jpg|b/2.jpg', '1 of 2 images .* the first is b/2.jpg'),
    'outside': ('1.jpg', '/gone/2.jpg', "file_name '/gone/2.jpg' leads out of the image folder"),
    'another file outside': ('1.jpg', '../1.jpg', r"file_name '../1.jpg' leads out of the image folder"),
    'nothing': ('1.jpg', 'x/..|/', 'leads out'),
    'very long': ('1.jpg', 'data:image/png;base64,' + 'ab/' * 200 + 'x' * 300, '1 of 1 images'),
    'a date': ('01.jpg', '2024-02.jpg', '1 of 1 images'),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_names_that_are_refused(case: str, tmp_path: Path) -> None:
    """--check_data counts them."""
    files, names, message = REFUSED[case]
    image_dir, given = folder(tmp_path, files), names.split('|')
    (tmp_path / '1.jpg').write_bytes(b'')
    with pytest.raises((UserError, FileError), match=message):
        find_images(given, image_dir, 'a.json')
    problems = Issues()
    if 'leads out' not in message:
        find_images(given, image_dir, 'a.json', problems=problems)
        assert sum(problems.counts.values()) == 1


def test_names_that_stand_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And names of files outside, once they are trusted, are not looked for inside."""
    monkeypatch.setattr('datasets.image_names.FilesBelow', None)
    names = ['1.jpg', 'a/2.jpg', str(tmp_path / 'o/1.jpg'), '../o/1.jpg']
    (tmp_path / 'o').mkdir()
    (tmp_path / 'o/1.jpg').write_bytes(b'')
    assert find_images(names, folder(tmp_path, '1.jpg|a/2.jpg'), 'a.json', allow_outside=True) is names


def test_links_are_followed_once(tmp_path: Path) -> None:
    image_dir = folder(tmp_path, 'a/1.jpg')
    (image_dir / 'loop').symlink_to(image_dir)
    (tmp_path / 'far').mkdir()
    (tmp_path / 'far/2.jpg').write_bytes(b'')
    (image_dir / 'far').symlink_to(tmp_path / 'far')
    assert find_images(['x\\1.jpg', 'x\\2.jpg'], image_dir, 'a.json') == ['a/1.jpg', 'far/2.jpg']


def test_absolute_names_of_this_folder(tmp_path: Path) -> None:
    image_dir = folder(tmp_path, 'a/1.jpg')
    assert find_images([str(image_dir / 'a/1.jpg')], image_dir, 'a.json') == ['a/1.jpg']
