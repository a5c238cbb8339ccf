//! The picture as numbers: layers over the disk, in boxes.

use crate::chain::Chain;
use crate::survey::Piece;

/// The most rows; longer chains have several layers in a row.
const MAX_ROWS: usize = 500;
const COLUMNS: usize = 512;

/// What a box shows, the first that applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shade {
    /// Data that the guest sees.
    Visible,
    /// Data that layers further up hide.
    Shadowed,
    /// Zeroes.
    Zero,
    /// Nothing.
    Empty,
}

#[derive(Clone, Copy, Default)]
struct Cell {
    held: f32,
    visible: f32,
    zero: f32,
}

/// Boxes of layers over the disk.
pub struct Grid {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
    /// Layers in a row.
    pub layers_per_row: usize,
    disk: u64,
    cells: Vec<Cell>,
}

impl Grid {
    /// An empty grid.
    pub fn new(chain: &Chain) -> Self {
        let layers_per_row = chain.layers.len().div_ceil(MAX_ROWS);
        let rows = chain.layers.len().div_ceil(layers_per_row);
        Self {
            rows,
            columns: COLUMNS,
            layers_per_row,
            disk: chain.disk_size().max(1),
            cells: vec![Cell::default(); rows * COLUMNS],
        }
    }

    /// Paints a piece.
    pub fn add(&mut self, piece: &Piece) {
        let end = piece.start.saturating_add(piece.len).min(self.disk);
        if piece.start >= end {
            return;
        }
        let row = piece.depth / self.layers_per_row;
        let scale = self.columns as f64 / self.disk as f64;
        let (from, upto) = (piece.start as f64 * scale, end as f64 * scale);
        let last = (upto.ceil() as usize).clamp(1, self.columns);
        for column in (from as usize).min(last - 1)..last {
            let left = from.max(column as f64);
            let part = (upto.min((column + 1) as f64) - left).max(0.0) as f32;
            let cell = &mut self.cells[row * self.columns + column];
            match (piece.data, piece.visible) {
                (true, true) => cell.visible += part,
                (true, false) => cell.held += part,
                (false, false) => cell.zero += part,
                (false, true) => {}
            }
        }
    }

    /// What to paint.
    pub fn shade(&self, row: usize, column: usize) -> Shade {
        let cell = self.cells[row * self.columns + column];
        if cell.visible > 0.0 && cell.visible * 2.0 >= cell.held {
            Shade::Visible
        } else if cell.held > 0.0 {
            Shade::Shadowed
        } else if cell.zero > 0.0 {
            Shade::Zero
        } else {
            Shade::Empty
        }
    }

    /// The first row from which the guest sees something in this column.
    pub fn served(&self, column: usize) -> Option<usize> {
        (0..self.rows)
            .map(|row| (row, self.cells[row * self.columns + column].visible))
            .filter(|(_, visible)| *visible > 0.0)
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .map(|(row, _)| row)
    }
}
