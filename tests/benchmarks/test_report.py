"""The report: generated pages, figures, and what it refuses."""

from pathlib import Path
import re

import pytest

from benchmarks import contenders, cost, literature, report, runs, scaling
from benchmarks.__main__ import main
from benchmarks.command_line import DOCS
from benchmarks.store import Store

README = """before

<!-- headline: begin -->
<!-- headline: end -->

<!-- scaling: begin -->
<!-- scaling: end -->

after
"""


@pytest.fixture
def docs(tmp_path):
  (tmp_path / 'README.md').write_text(README)
  folder = tmp_path / 'docs'
  folder.mkdir()
  return folder


@pytest.fixture
def study(tiny, store, save_result):
  """Results in which bsfa is worth twice its steps and sgdm less than half."""
  for seed in range(3):
    for steps, loss in (10, 2.0), (20, 1.0), (40, 0.5), (60, 0.4):
      save_result('adamw', 0.1, seed, loss + 0.01 * seed, steps)
    for steps, loss in (5, 1.5), (20, 0.5):
      save_result('bsfa', 0.2, seed, loss + 0.01 * seed, steps)
    save_result('sgdm', 0.2, seed, 2.5)
    for steps, loss in (20, 0.75), (40, 0.25):
      save_result('muon', 0.2, seed, loss + 0.01 * seed, steps)
  save_result('muon', 0.2, 0, 0.2, steps=60)
  for contender, rate, loss in (
    ('adamw', 0.05, 1.2),
    ('adamw', 0.2, 1.3),
    ('bsfa', 0.1, 0.75),
    ('bsfa', 0.4, None),
  ):
    save_result(contender, rate, 0, loss)
  times = {'adamw': [1.0, 2.0, 3.0], 'bsfa': [1.6, 3.2, 4.8]}
  store.add_times(tiny, runs.in_units_of_adamw(times))


def rows_of(page: str, contender: str) -> list[list[str]]:
  return [
    [cell.strip() for cell in line.strip('|').split('|')]
    for line in page.splitlines()
    if line.startswith(f'| {contender} ')
  ]


def files(folder: Path) -> dict[str, bytes]:
  return {str(p): p.read_bytes() for p in sorted(folder.glob('**/*')) if p.is_file()}


def test_headline_is_in_readme_and_on_a_page(study, docs, folders):
  main(['report', *folders, '--docs', str(docs)])
  readme = (docs.parent / 'README.md').read_text()
  assert readme.startswith('before\n')
  assert readme.endswith('\nafter\n')
  (headline,) = rows_of(readme, '`tiny`')
  assert headline[1:] == [
    '>1.00x',
    '**2.00 ± 0.00x**',  # half way in log(steps)
    '1.41 ± 0.00x',
    '**2.00 ± 0.00x**',
    '1.41 ± 0.00x',
    '1.25 ± 0.00x',
  ]
  page = (docs / 'tables' / 'headline.md').read_text()
  assert rows_of(page, '`tiny`') == [headline]


def test_lengths_have_a_row_for_each_contender(tiny, store, study, save_result):
  """At 40 steps bsfa is worth 60 of AdamW's, at its best rate of two."""
  for rate, loss in (0.1, 0.4), (0.2, 0.6):
    save_result('bsfa', rate, 0, loss, steps=40)
  text = scaling.table(scaling.over_lengths(store, tiny, (20, 40, 80)))
  assert [row[1] for row in rows_of(text, '20')] == ['adamw', 'muon', 'bsfa']
  *_, bsfa = rows_of(text, '40')
  assert bsfa[1:] == ['bsfa', '0.1', '2', '1', '0.4000', '1.50x', '-', '0.81x', '-']
  assert not rows_of(text, '80')


def test_busy_machine_shows_in_the_times():
  times = runs.in_units_of_adamw({'adamw': [1.0] * 4, 'bsfa': [1.0, 1.0, 2.0, 3.0]})
  of = report.study('masked-chain', [], times)
  note = of.spread_of_times(['adamw', 'bsfa'])
  assert note == 'a step of bsfa 1.75, quartiles 1.00-2.75'


@pytest.mark.parametrize('absent', ['bsfa', 'muon'])
def test_contender_without_runs_is_named(absent, study, docs, folders, store, capsys):
  for path in (store.raw / 'tiny').glob(f'{absent}-*'):
    path.unlink()
  main(['report', *folders, '--docs', str(docs)])
  assert f'missing: tiny: all runs of nadamw, {absent}' in re.sub(
    ', (galore|kron|soap-10|soap)', '', capsys.readouterr().out
  )
  readme = (docs.parent / 'README.md').read_text()
  (headline,) = rows_of(readme, '`tiny`')
  of_muon, of_bsfa = [headline[1], headline[3]], [headline[2], headline[4]]
  assert (of_muon if absent == 'muon' else of_bsfa) == ['-', '-']
  assert '-' not in (of_bsfa if absent == 'muon' else of_muon)
  assert headline[5] == '-'
  assert f'\n\nNo run of `{absent}` yet on `tiny`.\n' in readme
  assert not rows_of((docs / 'tables' / 'tiny.md').read_text(), absent)
  assert (docs / 'figures' / 'speed-ups.svg').exists()


def test_contender_of_some_tasks_is_missed_there_alone():
  assert report.ONLY_ON.keys() <= contenders.CONTENDERS.keys()
  for name, meant in ('llama-novels', True), ('masked-chain', False):
    absent, *_ = report.missing(report.study(name, [], {}))
    assert 'nadamw' in absent
    assert ('normuon' in absent) is meant
    assert 'bsfa-metric' not in absent


def test_page_of_a_task_has_its_tables(study, docs, folders):
  main(['report', *folders, '--docs', str(docs)])
  page = (docs / 'tables' / 'tiny.md').read_text()
  assert page.startswith('# tiny: a test, 20 steps\n')
  tuned, equal, *lengths = rows_of(page, 'bsfa')
  speed_ups = ['2.00 ± 0.00x', '2.00 ± 0.00x', '1.41 ± 0.00x', '1.60x', '1.25 ± 0.00x']
  assert tuned == ['bsfa', '0.2', '0.5100 ± 0.0100', *speed_ups, '8.0']
  assert equal == ['bsfa', '0.7500', '1.41x', '1']  # half way in log(steps)
  sweep = lengths[2:]
  assert [row[1] for row in lengths[:2]] == ['5', '20']
  assert [row[1] for row in sweep] == ['0.1', '**0.2**', '0.4']
  assert sweep[2][2] == 'diverged'
  assert rows_of(page, 'muon')[0][4] == '>1.00x'
  assert rows_of(page, 'sgdm')[0][3:6] == ['<0.50x', '-', '<1.00x']
  names = {'tiny.svg', 'speed-ups.svg'}
  assert {path.name for path in (docs / 'figures').iterdir()} == names
  linked = re.findall(r'\]\((.*?\.svg)\)', page)
  assert linked
  assert all((docs / 'tables' / name).exists() for name in linked)


def test_report_says_what_is_missing(study, docs, folders, capsys):
  main(['report', *folders, '--docs', str(docs)])
  printed = capsys.readouterr().out
  assert 'missing: tiny: all runs of nadamw' in printed
  assert "sgdm's best rate, 0.2, is at the end of its grid" in printed
  assert 'no time of sgdm' in printed
  assert '2 of 3 seeds of muon, 60 steps' in printed
  assert 'muon, 40 steps' not in printed
  assert 'of bsfa at' not in printed
  assert 'no time of bsfa\n' not in printed
  assert 'missing: masked-chain: everything' in printed
  page = (docs / 'tables' / 'missing.md').read_text()
  assert '- masked-chain: everything\n' in page


def test_report_twice_gives_the_same_bytes(study, docs, folders):
  main(['report', *folders, '--docs', str(docs)])
  before = files(docs)
  main(['report', *folders, '--docs', str(docs)])
  assert files(docs) == before


def test_report_of_compact_files_has_the_same_tables(study, docs, folders, store):
  main(['report', *folders, '--docs', str(docs)])
  before = files(docs / 'tables')
  main(['collect', *folders])
  for path in sorted((store.raw / 'tiny').iterdir())[1:]:
    path.unlink()
  main(['report', *folders, '--docs', str(docs)])
  assert files(docs / 'tables') == before


@pytest.mark.parametrize('wrong', ['--results', '--collected', 'both', '--docs'])
def test_report_without_results_writes_nothing(
  wrong, study, docs, folders, store, tmp_path, capsys
):
  main(['collect', *folders])
  nowhere = str(tmp_path / 'nowhere')
  options = [*folders, '--docs', str(docs)]
  if wrong == 'both':
    (tmp_path / 'nowhere').mkdir()
    options[1] = options[3] = nowhere
  else:
    options[options.index(wrong) + 1] = nowhere
  before = files(tmp_path)
  capsys.readouterr()
  with pytest.raises(SystemExit) as error:
    main(['report', *options])
  assert error.value.code == 2
  out, err = capsys.readouterr()
  assert not out
  for word in '--results' if wrong == 'both' else wrong, nowhere, 'give ':
    assert word in err
  assert files(tmp_path) == before


def test_readme_without_its_lines_is_an_error_and_nothing_is_written(
  study, docs, folders, capsys
):
  (docs.parent / 'README.md').write_text('no lines')
  with pytest.raises(SystemExit) as error:
    main(['report', *folders, '--docs', str(docs)])
  assert error.value.code == 2
  assert 'has not the lines <!-- headline: begin -->' in capsys.readouterr().err
  assert files(docs) == {}


@pytest.mark.slow
def test_sensitivity(tiny, store, docs, folders, save_result, capsys):
  options = ['--task', tiny, *folders]
  main(['sensitivity', *options])
  assert 'call tune first' in capsys.readouterr().out
  main(['run', *options, '--contender', 'bsfa', '--learning-rate', '0.1'])
  trained = {'bsfa-ridge-0.1', 'bsfa-refresh_every-5'}
  for name in set(contenders.VARIANTS) - trained:
    save_result(name, 0.1, 0, 0.2)
  main(['sensitivity', *options])
  assert f'2 of {len(contenders.VARIANTS)} runs to do' in capsys.readouterr().out
  changed = {r['contender']: r.get('settings') for r in store.load(tiny).values()}
  assert set(changed) == {'bsfa', *contenders.VARIANTS}
  of_bsfa, of_ridge = changed['bsfa'], changed['bsfa-ridge-0.1']
  assert of_ridge['filter'] == of_bsfa['filter'] | {'ridge': 0.1}
  assert changed['bsfa-refresh_every-5']['filter']['refresh_every'] == 5
  main(['report', *folders, '--docs', str(docs)])
  assert (docs / 'figures' / 'sensitivity-tiny.svg').exists()
  page = (docs / 'tables' / 'tiny.md').read_text()
  assert 'figures/sensitivity-tiny.svg' in page


def test_worth_interpolates_in_log_steps():
  reference = [(100, 2.0), (400, 1.0)]
  assert report.steps_worth(1.5, reference) == ('=', pytest.approx(200))
  assert report.steps_worth(2.0, reference) == ('=', 100)
  assert report.steps_worth(1.0, reference) == ('=', 400)
  assert report.steps_worth(2.1, reference) == ('<', 100)
  assert report.steps_worth(float('nan'), reference) == ('<', 100)
  assert report.steps_worth(0.9, reference) == ('>', 400)


def test_committed_pages_are_those_of_the_results():
  store = Store(Path('none'))
  made = report.pages(report.load(store)) | literature.pages(store) | cost.pages(store)
  assert made == {p.stem: p.read_text() for p in (DOCS / 'tables').glob('*.md')}
  scales = scaling.drawn(store)
  parts = {
    DOCS / scaling.PAGE: scaling.part([*scales, *scaling.elsewhere(store)]),
    DOCS.parent / 'README.md': scaling.summary(scales),
  }
  for path, part in parts.items():
    assert report.rewritten(path, 'scaling', part) == path.read_text()
