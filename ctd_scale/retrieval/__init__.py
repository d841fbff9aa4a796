"""Dense and text candidates, exactly rescored."""
