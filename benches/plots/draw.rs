//! A white sheet with a title, a caption, and panels of lines between them; readable on any page around it.

use std::{ops::Range, path::Path};

use plotters::{
    coord::{Shift, types::RangedCoordf64},
    element::{Drawable, PointCollection},
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

pub(crate) const WIDTH: i32 = 880;

/// Where a panel begins and ends that is as wide as the sheet.
pub(crate) const WHOLE: Range<i32> = 62..WIDTH - 26;
/// The same of two beside each other.
pub(crate) const HALVES: [Range<i32>; 2] = [62..438, 504..WIDTH - 26];

const PAPER: RGBColor = WHITE;
const EDGE: RGBColor = RGBColor(0xd0, 0xd7, 0xde);
const GRID: RGBColor = RGBColor(0xe6, 0xe9, 0xed);
const SHADE: RGBColor = RGBColor(0xf3, 0xf4, 0xf6);
const INK: RGBColor = RGBColor(0x1f, 0x23, 0x28);
const PALE_INK: RGBColor = RGBColor(0x57, 0x60, 0x6a);

type Area<'p> = DrawingArea<SVGBackend<'p>, Shift>;
type Chart<'p> = ChartContext<'p, SVGBackend<'p>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Whose line it is: told apart by everybody, by its marks alone too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Ours,
    Theirs,
}

pub(crate) struct Sheet<'p> {
    root: Area<'p>,
}

/// One of its two directions.
pub(crate) struct Axis {
    pub(crate) range: Range<f64>,
    /// Where it has a number, or a word.
    pub(crate) ticks: Vec<(f64, String)>,
    /// What it is, with its unit.
    pub(crate) title: String,
}

pub(crate) struct Panel<'p> {
    root: Area<'p>,
    chart: Chart<'p>,
    y: Range<i32>,
}

/// A point of a line, with how far it spreads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Point {
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) spread: (f64, f64),
}

// === impl Sheet ===

impl<'p> Sheet<'p> {
    /// To be written to `path`, of this height.
    pub(crate) fn new(path: &'p Path, height: i32, title: &str, lines: &[&str]) -> Self {
        let size = [WIDTH, height].map(|length| u32::try_from(length).expect("a length"));
        let root = SVGBackend::new(path, size.into()).into_drawing_area();
        put(
            &root,
            Rectangle::new([(0, 0), (WIDTH, height)], PAPER.filled()),
        );
        let edge = [(0, 0), (WIDTH - 1, height - 1)];
        put(&root, Rectangle::new(edge, EDGE.stroke_width(1)));
        let sheet = Self { root };
        sheet.text((24, 20), title, &text(20, INK, HPos::Left, VPos::Top, true));
        let style = text(14, PALE_INK, HPos::Left, VPos::Top, false);
        for (n, line) in (0..).zip(lines) {
            sheet.text((24, 50 + n * 19), line, &style);
        }
        sheet
    }

    /// The caption, under everything.
    pub(crate) fn caption(&self, bottom: i32, lines: &[&str]) {
        let style = text(12, PALE_INK, HPos::Left, VPos::Bottom, false);
        for (n, line) in (0..).zip(lines.iter().rev()) {
            self.text((24, bottom - n * 16), line, &style);
        }
    }

    /// Whose lines are which, with marks or without, from `at` on to the right.
    pub(crate) fn legend(&self, at: (i32, i32), names: &[(Line, &str)], marks: bool) {
        let (mut x, y) = at;
        for (line, name) in names {
            let stroke = line
                .color()
                .stroke_width(if marks { 2 } else { line.width() });
            put(&self.root, PathElement::new([(x, y), (x + 26, y)], stroke));
            if marks {
                line.mark(&self.root, (x + 13, y));
            }
            let style = text(13, INK, HPos::Left, VPos::Center, false);
            self.text((x + 34, y), name, &style);
            // About as wide as it is in most fonts.
            x += 34 + 7 * i32::try_from(name.len()).expect("a name") + 22;
        }
    }

    /// A panel between these pixels, with its grid, over some shades.
    pub(crate) fn panel(
        &self,
        x: Range<i32>,
        y: Range<i32>,
        across: &Axis,
        up: &Axis,
        shades: &[Range<f64>],
    ) -> Panel<'p> {
        let (width, height) = (x.end - x.start, y.end - y.start);
        let area = self
            .root
            .clone()
            .shrink((x.start, y.start), (width, height));
        let chart = ChartBuilder::on(&area)
            .build_cartesian_2d(across.range.clone(), up.range.clone())
            .expect("it is drawn");
        let panel = Panel {
            root: self.root.clone(),
            chart,
            y: y.clone(),
        };
        for shade in shades {
            panel.shade(shade);
        }
        let numbers = text(12, PALE_INK, HPos::Right, VPos::Center, false);
        for (at, label) in &up.ticks {
            let (_, pixel) = panel.pixel(across.range.start, *at);
            let line = [(x.start, pixel), (x.end, pixel)];
            put(&self.root, PathElement::new(line, GRID.stroke_width(1)));
            self.text((x.start - 8, pixel), label, &numbers);
        }
        let numbers = text(12, PALE_INK, HPos::Center, VPos::Top, false);
        for (at, label) in &across.ticks {
            let (pixel, _) = panel.pixel(*at, up.range.start);
            let line = [(pixel, y.end), (pixel, y.end + 5)];
            put(&self.root, PathElement::new(line, PALE_INK.stroke_width(1)));
            self.text((pixel, y.end + 9), label, &numbers);
        }
        let base = [(x.start, y.end), (x.end, y.end)];
        put(&self.root, PathElement::new(base, PALE_INK.stroke_width(1)));
        let middle = i32::midpoint(x.start, x.end);
        let below = text(12, INK, HPos::Center, VPos::Top, false);
        self.text((middle, y.end + 28), &across.title, &below);
        let above = text(12, INK, HPos::Left, VPos::Bottom, false);
        self.text((x.start - 38, y.start - 10), &up.title, &above);
        panel
    }

    /// A panel's heading.
    pub(crate) fn heading(&self, at: (i32, i32), words: &str) {
        self.text(at, words, &text(14, INK, HPos::Left, VPos::Center, true));
    }

    pub(crate) fn write(self) {
        self.root.present().expect("it is written");
    }

    fn text(&self, at: (i32, i32), words: &str, style: &TextStyle<'_>) {
        put(&self.root, Text::new(words.to_owned(), at, style.clone()));
    }
}

// === impl Panel ===

impl<'p> Panel<'p> {
    /// Lines with their marks, over how far they spread.
    pub(crate) fn lines(&mut self, lines: &[(Line, &[Point])]) {
        for (line, points) in lines {
            let upper = points.iter().map(|point| (point.x, point.spread.1));
            let lower = points.iter().rev().map(|point| (point.x, point.spread.0));
            let around: Vec<_> = upper.chain(lower).collect();
            self.draw(Polygon::new(around, line.color().mix(0.16)));
        }
        for (line, points) in lines {
            let middle: Vec<_> = points.iter().map(|point| (point.x, point.y)).collect();
            self.draw(PathElement::new(middle, line.color().stroke_width(2)));
            for point in *points {
                line.mark(&self.root, self.pixel(point.x, point.y));
            }
        }
    }

    /// A line without marks, of many points. Theirs is wider, to be seen where ours lies on it.
    pub(crate) fn curve(&mut self, line: Line, points: Vec<(f64, f64)>) {
        let stroke = line.color().stroke_width(line.width());
        self.draw(PathElement::new(points, stroke));
    }

    /// What a point is, above or below it, or aside from a line that rises.
    pub(crate) fn name(&self, line: Line, at: (f64, f64), words: &str, above: bool, rising: bool) {
        let (x, y) = self.pixel(at.0, at.1);
        let (y, from) = match above {
            true => (y - 9, VPos::Bottom),
            false => (y + 9, VPos::Top),
        };
        let (x, side) = match (rising, above) {
            (false, _) => (x, HPos::Center),
            (true, true) => (x + 8, HPos::Right),
            (true, false) => (x - 8, HPos::Left),
        };
        let style = text(12, line.color(), side, from, true);
        put(&self.root, Text::new(words.to_owned(), (x, y), style));
    }

    /// Something is so from here to there.
    pub(crate) fn shade(&self, x: &Range<f64>) {
        let [(from, _), (to, _)] = [x.start, x.end].map(|x| self.pixel(x, 0.0));
        let area = [(from, self.y.start), (to, self.y.end)];
        put(&self.root, Rectangle::new(area, SHADE.filled()));
    }

    /// Something happens here: a line through the panel, and from `rises` above it, with words.
    pub(crate) fn event(&self, x: f64, rises: Option<(i32, &str)>) {
        let (x, _) = self.pixel(x, 0.0);
        let top = self.y.start - rises.map_or(0, |(rises, _)| rises);
        // plotters has no dashed lines of pixels.
        for from in (top..self.y.end).step_by(7) {
            let dash = [(x, from), (x, (from + 4).min(self.y.end))];
            put(&self.root, PathElement::new(dash, PALE_INK.stroke_width(1)));
        }
        if let Some((_, words)) = rises {
            let style = text(12, INK, HPos::Left, VPos::Top, false);
            put(&self.root, Text::new(words.to_owned(), (x + 6, top), style));
        }
    }

    fn pixel(&self, x: f64, y: f64) -> (i32, i32) {
        self.chart.backend_coord(&(x, y))
    }

    fn draw<E>(&mut self, element: E)
    where
        for<'a> &'a E: PointCollection<'a, (f64, f64)>,
        E: Drawable<SVGBackend<'p>>,
    {
        let drawn = self.chart.draw_series(std::iter::once(element));
        drawn.expect("it is drawn");
    }
}

// === impl Line ===

impl Line {
    /// Of Okabe's and Ito's colours.
    const fn color(self) -> RGBColor {
        match self {
            Self::Ours => RGBColor(0x00, 0x72, 0xb2),
            Self::Theirs => RGBColor(0xd5, 0x5e, 0x00),
        }
    }

    /// In pixels, of a line without marks.
    const fn width(self) -> u32 {
        match self {
            Self::Ours => 2,
            Self::Theirs => 4,
        }
    }

    fn mark(self, root: &Area<'_>, (x, y): (i32, i32)) {
        let color = self.color().filled();
        match self {
            Self::Ours => put(root, Circle::new((x, y), 5, color)),
            Self::Theirs => put(
                root,
                Rectangle::new([(x - 4, y - 4), (x + 4, y + 4)], color),
            ),
        }
    }
}

fn put<'p, E>(root: &Area<'p>, element: E)
where
    for<'a> &'a E: PointCollection<'a, (i32, i32)>,
    E: Drawable<SVGBackend<'p>>,
{
    root.draw(&element).expect("it is drawn");
}

fn text(size: u32, color: RGBColor, h: HPos, v: VPos, bold: bool) -> TextStyle<'static> {
    // plotters divides by that.
    let font = ("sans-serif", f64::from(size) * 1.24).into_font();
    let style = match bold {
        true => FontStyle::Bold,
        false => FontStyle::Normal,
    };
    let mut style = TextStyle::from(font.style(style)).pos(Pos::new(h, v));
    style.color = color.to_backend_color();
    style
}
