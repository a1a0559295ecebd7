//! One kind of chart, as SVG: marks joined by lines, each series named at the right in the order of its height.
//!
//! Black stands for the colour of the text, which the page puts in its place. So a chart is readable in light and in dark.

use std::fmt::Display;
use std::ops::Range;

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Six colours that colour-blind people tell apart, on white and on black. [Okabe and Ito 2008]
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(213, 94, 0),
    RGBColor(86, 180, 233),
];

/// Pixels.
const WIDTH: u32 = 960;
const HEIGHT_MIN: u32 = 380;
const NAMES_WIDTH: u32 = 300;
const LINE_HEIGHT: i32 = 16;
const FONT: i32 = 15;

/// A chart.
pub(super) struct Chart<'a> {
    pub(super) x: Axis<'a>,
    pub(super) y: &'a str,
    /// Lowest and highest number of the upward axis; marks beyond it are drawn on its end.
    pub(super) range: (f64, f64),
    pub(super) series: Vec<Series>,
}

/// The axis to the right.
pub(super) enum Axis<'a> {
    /// A logarithmic axis in FLOPs; what costs nothing stands at the left.
    Cost(&'a str),
    /// A logarithmic axis that names the numbers of the marks.
    Counts(&'a str),
    /// The places of a list, from 1.
    Places(&'a str),
    /// An axis from zero that names round numbers.
    Amount(&'a str),
}

/// Marks that are joined by a line.
pub(super) struct Series {
    pub(super) name: String,
    /// Colour and shape; series of one look are told apart by their names.
    pub(super) look: usize,
    pub(super) points: Vec<Point>,
}

/// A mark, and how far it is uncertain upwards and downwards.
#[derive(Debug, Clone, Copy)]
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) error: f64,
    /// Radius of the mark.
    pub(super) size: u32,
}

impl Axis<'_> {
    fn name(&self) -> &str {
        match self {
            Axis::Cost(name) | Axis::Counts(name) | Axis::Places(name) | Axis::Amount(name) => name,
        }
    }

    /// Where a number stands, before scaling; `None` for what is nothing on a logarithmic axis.
    fn place(&self, x: f64) -> Option<f64> {
        match self {
            Axis::Places(_) | Axis::Amount(_) => Some(x),
            Axis::Cost(_) | Axis::Counts(_) => (x > 0.0).then(|| x.log10()),
        }
    }

    fn scale(&self, numbers: &[f64]) -> Scale {
        let places = || numbers.iter().filter_map(|x| self.place(*x));
        let (low, high) = extent(places());
        // Wide enough for a mark, and for one of the numbers 1, 2 and 5 on a logarithmic axis.
        let margin = (0.05 * (high - low)).max(0.2);
        let (low, high) = match self {
            Axis::Amount(_) => (0.0, 1.02 * high),
            _ => (low - margin, high + margin),
        };
        let named: Vec<f64> = match self {
            Axis::Amount(_) => {
                let step = round(high / 8.0);
                (0..=8).map(|i| f64::from(i) * step).collect()
            }
            // 1, 2 and 5 times each power of ten, and fewer of them on a long axis.
            Axis::Cost(_) => {
                let steps: &[f64] = if high - low > 3.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
                let powers = low.floor() as i32..=high.ceil() as i32;
                powers.flat_map(|power| steps.iter().map(move |step| f64::from(power) + step.log10())).collect()
            }
            Axis::Counts(_) | Axis::Places(_) => {
                let mut all: Vec<f64> = places().collect();
                all.sort_by(f64::total_cmp);
                all.dedup();
                let step = all.len().div_ceil(16);
                all.into_iter().step_by(step.max(1)).collect()
            }
        };
        let mut named: Vec<f64> = named.into_iter().filter(|x| (low..=high).contains(x)).collect();
        if numbers.iter().all(|x| self.place(*x).is_some()) {
            return Scale { ends: (low, high), nothing: f64::NEG_INFINITY, named };
        }
        let nothing = low - 2.0 * margin;
        named.push(nothing);
        Scale { ends: (nothing - margin, high), nothing, named }
    }

    fn label(&self, place: f64) -> String {
        match self {
            Axis::Cost(_) => format!("{:.0e}", 10_f64.powf(place)),
            Axis::Counts(_) => format!("{:.0}", 10_f64.powf(place)),
            Axis::Places(_) => format!("{place:.0}"),
            // As few digits as tell the round numbers apart.
            Axis::Amount(_) => format!("{}", (place * 1e4).round() / 1e4),
        }
    }
}

/// An axis between two places that names some others. The library's own one with given places cannot format them.
struct Scale {
    ends: (f64, f64),
    /// The place of what costs nothing; below the axis if there is none.
    nothing: f64,
    named: Vec<f64>,
}

impl Ranged for Scale {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, place: &f64, (left, right): (i32, i32)) -> i32 {
        let (low, high) = self.ends;
        left + ((place - low) / (high - low) * f64::from(right - left)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.named.clone()
    }

    fn range(&self) -> Range<f64> {
        self.ends.0..self.ends.1
    }
}

/// The next number that is 1, 2 or 5 times a power of ten.
fn round(number: f64) -> f64 {
    let power = 10_f64.powf(number.log10().floor());
    [1.0, 2.0, 5.0, 10.0].map(|step| step * power).into_iter().find(|round| *round >= number).unwrap_or(10.0 * power)
}

/// The smallest and the largest number.
pub(super) fn extent(numbers: impl Iterator<Item = f64>) -> (f64, f64) {
    numbers.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)))
}

impl Chart<'_> {
    /// The chart as an `svg` element.
    pub(super) fn svg(&self) -> anyhow::Result<String> {
        let numbers: Vec<f64> = self.series.iter().flat_map(|s| s.points.iter().map(|p| p.x)).collect();
        let scale = self.x.scale(&numbers);
        let nothing = scale.nothing;
        let height = HEIGHT_MIN.max(80 + self.series.len() as u32 * LINE_HEIGHT as u32);
        let mut text = String::new();
        {
            let root = SVGBackend::with_string(&mut text, (WIDTH, height)).into_drawing_area();
            let mut builder = ChartBuilder::on(&root);
            builder.margin(12).margin_right(NAMES_WIDTH).x_label_area_size(48).y_label_area_size(64);
            let mut chart = builder.build_cartesian_2d(scale, self.range.0..self.range.1).map_err(failed)?;
            chart
                .configure_mesh()
                .light_line_style(TRANSPARENT)
                .bold_line_style(BLACK.mix(0.12))
                .x_desc(self.x.name())
                .y_desc(self.y)
                .label_style(("sans-serif", FONT))
                .x_label_formatter(&|x| if *x == nothing { "none".to_owned() } else { self.x.label(*x) })
                .draw()
                .map_err(failed)?;
            let at = |p: &Point| (self.x.place(p.x).unwrap_or(nothing), p.y.clamp(self.range.0, self.range.1));
            let mut ends = Vec::new();
            for series in &self.series {
                let colour = colour(series.look);
                let places: Vec<(f64, f64)> = series.points.iter().map(at).collect();
                chart.draw_series([PathElement::new(places.clone(), colour.mix(0.6).stroke_width(2))]).map_err(failed)?;
                for point in series.points.iter().filter(|p| p.error > 0.0) {
                    let end = |y: f64| at(&Point { y, ..*point });
                    let bar = vec![end(point.y - point.error), end(point.y + point.error)];
                    chart.draw_series([PathElement::new(bar, colour.stroke_width(1))]).map_err(failed)?;
                }
                for (place, point) in places.iter().zip(&series.points) {
                    mark(&root, chart.backend_coord(place), series.look, point.size)?;
                }
                ends.extend(series.points.last().map(|last| (last.y, chart.backend_coord(&at(last)), series)));
            }
            ends.sort_by(|a, b| b.0.total_cmp(&a.0));
            names(&root, ends, height as i32)?;
            root.present().map_err(failed)?;
        }
        Ok(text)
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Names each series at the right, as high as its last mark where there is room, and leads a thin line to it. The highest comes
/// first in `ends`.
fn names(root: &Area<'_>, ends: Vec<(f64, (i32, i32), &Series)>, height: i32) -> anyhow::Result<()> {
    let x = (WIDTH - NAMES_WIDTH) as i32;
    let wanted: Vec<i32> = ends.iter().map(|(_, (_, y), _)| *y).collect();
    for ((_, end, series), y) in ends.into_iter().zip(spread(&wanted, LINE_HEIGHT, height - LINE_HEIGHT)) {
        let lead = vec![(end.0 + 6, end.1), (x + 4, end.1), (x + 20, y)];
        root.draw(&PathElement::new(lead, BLACK.mix(0.2).stroke_width(1))).map_err(failed)?;
        mark(root, (x + 28, y), series.look, 4)?;
        let style = TextStyle::from(("sans-serif", FONT)).pos(Pos::new(HPos::Left, VPos::Center));
        root.draw(&Text::new(series.name.clone(), (x + 38, y), style)).map_err(failed)?;
    }
    Ok(())
}

/// Heights at least `step` apart and at most `last`, near those `wanted`, which rise.
fn spread(wanted: &[i32], step: i32, last: i32) -> Vec<i32> {
    let mut heights: Vec<i32> = Vec::new();
    for &y in wanted {
        heights.push(heights.last().map_or(y, |above| y.max(above + step)));
    }
    let mut below = last + step;
    for y in heights.iter_mut().rev() {
        *y = (*y).min(below - step);
        below = *y;
    }
    heights
}

fn colour(look: usize) -> RGBColor {
    COLOURS[look % COLOURS.len()]
}

fn mark(root: &Area<'_>, at: (i32, i32), look: usize, size: u32) -> anyhow::Result<()> {
    match look / COLOURS.len() % 2 {
        0 => root.draw(&Circle::new(at, size, colour(look).filled())),
        _ => root.draw(&TriangleMarker::new(at, size + 2, colour(look).filled())),
    }
    .map_err(failed)
}

fn failed(error: impl Display) -> anyhow::Error {
    anyhow!("a chart cannot be drawn: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_round_names() {
        assert_eq!([0.3, 1.0, 1.1, 4.9, 70.0].map(round), [0.5, 1.0, 2.0, 5.0, 100.0]);
        let scale = Axis::Amount("x").scale(&[3.0, 14.0]);
        assert_eq!(scale.named, [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0]);
    }

    #[test]
    fn names_keep_apart_and_within_the_chart() {
        assert_eq!(spread(&[10, 12, 50], 16, 100), [10, 26, 50]);
        assert_eq!(spread(&[80, 90, 95], 16, 100), [68, 84, 100]);
    }

    #[test]
    fn a_chart_names_its_series_and_keeps_to_its_range() {
        let point = |x: f64, y: f64| Point { x, y, error: 0.5, size: 4 };
        let series = |name: &str, look, points| Series { name: name.to_owned(), look, points };
        let series = vec![series("a < b", 0, vec![point(0.0, 2.0)]), series("c", 7, vec![point(1e9, 2.5), point(3e11, 900.0)])];
        let svg = Chart { x: Axis::Cost("FLOPs"), y: "perplexity", range: (1.0, 4.0), series }.svg().unwrap();
        for part in ["a &lt; b", "perplexity", "FLOPs", "none", "1e10", "<polygon", "<circle"] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        // No mark stands above the chart.
        assert!(svg.starts_with("<svg") && !svg.contains(",-"), "{svg}");
    }
}
