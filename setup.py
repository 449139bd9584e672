"The bridge from `settings.ini`, where every fact about the package stands once, to setuptools."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters='=', interpolation=None)
with (here / 'settings.ini').open(encoding='utf-8') as f:
    parser.read_file(f)
cfg = parser['DEFAULT']
lib = cfg['lib_path']

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'],
    author=cfg['author'],
    license=cfg['license'],
    packages=find_packages(include=[lib, f'{lib}.*']),
    python_requires=f'>={cfg["min_python"]}',
    install_requires=cfg['requirements'].split(),
    extras_require=dict(dev=cfg['dev_requirements'].split()),
    entry_points=dict(
        nbdev=[f'{lib}={lib}._modidx:d'], console_scripts=cfg['console_scripts'].split()
    ),
)
