//! A block of lines that is drawn again in its place.

use std::io::{self, Write as _};

use super::text::Text;

/// Where a block is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Out,
    Err,
}

#[derive(Debug)]
pub struct Board {
    place: Place,
    /// Lines drawn last.
    drawn: usize,
}

/// Lines of a terminal whose size is not known.
const HEIGHT: usize = 24;

impl Board {
    pub fn new(place: Place) -> Board {
        Board { place, drawn: 0 }
    }

    /// Draws the block over the last one. More lines than the terminal has could not be drawn over again, so the rest
    /// is left out.
    pub fn draw(&mut self, lines: &[Text], width: usize, colour: bool) {
        let height = self.height().saturating_sub(1).max(1);
        let mut text = self.above();
        for line in lines.iter().take(height) {
            text.push_str(&line.clone().fit(width).render(colour));
            text.push('\n');
        }
        self.drawn = lines.len().min(height);
        self.write(&text);
    }

    /// Back to the block's first line, and everything from there on erased.
    fn above(&self) -> String {
        match self.drawn {
            0 => String::new(),
            lines => format!("\x1b[{lines}A\r\x1b[J"),
        }
    }

    fn height(&self) -> usize {
        let size = match self.place {
            Place::Out => rustix::termios::tcgetwinsize(io::stdout()),
            Place::Err => rustix::termios::tcgetwinsize(io::stderr()),
        };
        size.ok().map(|size| usize::from(size.ws_row)).filter(|rows| *rows > 0).unwrap_or(HEIGHT)
    }

    fn write(&self, text: &str) {
        // A terminal that is gone shows nothing; the command goes on.
        let _ = match self.place {
            Place::Out => io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()),
            Place::Err => io::stderr().write_all(text.as_bytes()),
        };
    }
}
